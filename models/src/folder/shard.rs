//! One safetensors file: its header parsed, its data mapped; and how one is written.

use crate::bridge;
use crate::error::{Error, Result};
use crate::weights::{Encoding, Stored};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo, TensorView};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where in the file the data begins.
    data: usize,
}

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let unreadable = |cause| Error::Io {
            path: path.to_owned(),
            cause,
            advice: "check that it is a file that may be read",
        };
        let file = File::open(path).map_err(unreadable)?;
        let map = bridge::map_file(&file).map_err(unreadable)?;
        let (header, data) = parse(&map).map_err(|(what, wanted, found)| Error::Format {
            path: path.to_owned(),
            what: what.to_owned(),
            wanted,
            found,
            advice: "fetch the file again",
        })?;
        Ok(Self { path: path.to_owned(), map, header, data })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// A text of the header's `__metadata__`.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// A tensor that [`Self::has`].
    pub(crate) fn stored(&self, name: &str) -> Result<Stored<'_>> {
        let missing = || Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            advice: "fetch the file again",
        };
        let TensorInfo { dtype, shape, data_offsets: (from, to) } =
            self.header.info(name).ok_or_else(missing)?;
        let encoding = match dtype {
            Dtype::F32 => Encoding::F32,
            Dtype::F16 => Encoding::F16,
            Dtype::BF16 => Encoding::BF16,
            _ => {
                return Err(Error::WrongDtype {
                    path: self.path.clone(),
                    tensor: name.to_owned(),
                    found: dtype.to_string(),
                });
            }
        };
        Ok(Stored {
            path: &self.path,
            name: name.to_owned(),
            shape: shape.clone(),
            encoding,
            bytes: self.map[self.data..].get(*from..*to).ok_or_else(missing)?,
            map: Some(&self.map),
            interleaved: None,
        })
    }
}

/// The header, and where the data begins; else what is wrong, what was wanted and what was found.
///
/// The parts are those of the `safetensors` crate, whose own reader adds lengths that a header can
/// make overflow.
fn parse(bytes: &[u8]) -> std::result::Result<(Metadata, usize), (&'static str, String, String)> {
    const LENGTH: usize = 8;
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
        return Err((
            "the file's size",
            "at least 8 bytes".to_owned(),
            format!("{} bytes", bytes.len()),
        ));
    };
    let length = u64::from_le_bytes(*length);
    let Some(header) = usize::try_from(length).ok().and_then(|length| rest.get(..length)) else {
        return Err((
            "the header's length",
            format!("at most the {} bytes that follow", rest.len()),
            length.to_string(),
        ));
    };
    let data = LENGTH + header.len();
    let header: Metadata = serde_json::from_slice(header).map_err(|error| {
        ("the header", "tensors with shapes that fit their offsets".to_owned(), error.to_string())
    })?;
    if header.data_len() != bytes.len() - data {
        let (wanted, found) = (header.data_len(), bytes.len() - data);
        return Err((
            "the data",
            format!("the {wanted} bytes of the header"),
            format!("{found} bytes"),
        ));
    }
    Ok((header, data))
}

/// Writes `tensors`, f32 or bf16, with `metadata`: beside `path` first, so that a half-written file is never found.
pub(crate) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: HashMap<String, String>,
) -> Result<()> {
    let stored = tensors.iter().map(|(name, tensor)| Ok((name, bytes(tensor)?)));
    let stored = stored.collect::<Result<Vec<_>>>()?;
    let views = stored.iter().map(|(name, (dtype, shape, bytes))| {
        Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
    });
    let refused = |cause: std::io::Error| Error::Write { path: path.to_owned(), cause };
    let file = views
        .collect::<std::result::Result<Vec<_>, _>>()
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error| refused(std::io::Error::other(error)))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let readable = std::fs::Permissions::from_mode(0o644); // a temporary file is its owner's alone
    let mut beside = tempfile::Builder::new()
        .permissions(readable)
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .map_err(refused)?;
    beside.write_all(&file).map_err(refused)?;
    beside.persist(path).map_err(|error| refused(error.error))?;
    Ok(())
}

fn bytes(tensor: &Tensor) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    let flat = tensor.f_to_device(tch::Device::Cpu)?.f_reshape([-1])?;
    Ok(match tensor.f_kind()? {
        Kind::Float => {
            let values = Vec::<f32>::try_from(&flat)?;
            (Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
        }
        Kind::BFloat16 => {
            // As their bits: tch takes bf16 for f16 when it copies.
            let values = Vec::<i16>::try_from(&flat.f_view_dtype(Kind::Int16)?)?;
            (Dtype::BF16, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
        }
        other => return Err(Error::WeightKind(format!("{other:?}"))),
    })
}
