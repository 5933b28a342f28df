//! Rows to learn from, on disk: a folder of shards that are written whole or not at all.

use crate::error::{Error, Result};
use crate::file;
use crate::torch::{dims, expect};
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo, View};
use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::thread::{self, available_parallelism};
use tch::{Device, Kind, TchError, Tensor};

/// Hidden states and their targets, layer by layer: `[rows, hidden]` of any float dtype and `[rows, kv_heads]` f32.
pub type Rows = Vec<(Tensor, Tensor)>;

/// A folder of shards, each a safetensors file of all layers' [`Rows`]: `hidden.{layer}` and `scores.{layer}`.
///
/// Shards are numbered, written beside their place and renamed into it; so a collection that was interrupted goes on
/// with the shards that are missing. Each carries the settings that it was made with, and one made with others is
/// refused. Of what is read no more than the layers asked for is in memory.
#[derive(Debug)]
pub struct Samples {
    folder: PathBuf,
    settings: String,
}

const SETTINGS: &str = "settings";
/// No header of a shard is longer.
const LONGEST_HEADER: u64 = 1 << 24;

impl Samples {
    /// The samples in `folder`, which is made if need be. `settings` is whatever tells them from others: model, texts, seed.
    pub fn open(folder: impl Into<PathBuf>, settings: impl Into<String>) -> Result<Self> {
        let (folder, settings) = (folder.into(), settings.into());
        fs::create_dir_all(&folder).map_err(|cause| Error::File { path: folder.clone(), cause })?;
        Ok(Self { folder, settings })
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.folder.join(format!("shard-{shard:05}.safetensors"))
    }

    /// Whether a shard is there, made with these settings.
    ///
    /// # Errors
    /// [`Error::OtherSamples`] if it was made with others, and what is wrong with a damaged one.
    pub fn has(&self, shard: usize) -> Result<bool> {
        let path = self.path(shard);
        Ok(path.exists() && Shard::open(path, &self.settings).map(|_| true)?)
    }

    /// Writes a shard. Floats of more than two bytes are stored as f16, which the spread of normed hidden states fits.
    ///
    /// # Errors
    /// [`Error::Rows`] if a number is NaN or infinite, also after rounding; then nothing is written.
    pub fn write(&self, shard: usize, rows: &Rows) -> Result<()> {
        let (hidden, scores): (Vec<_>, Vec<_>) = rows.iter().map(|(a, b)| (a, b)).unzip();
        let half = hidden.first().map_or(Kind::Half, |hidden| match hidden.kind() {
            Kind::BFloat16 => Kind::BFloat16,
            _ => Kind::Half,
        });
        let (mut tensors, failed) = (Vec::new(), OnceCell::new());
        let hosts = on_host([(&hidden, half), (&scores, Kind::Float)])?;
        for ((name, layers), host) in
            [("hidden", hidden), ("scores", scores)].into_iter().zip(&hosts)
        {
            let mut start = 0;
            for (layer, tensor) in layers.into_iter().enumerate() {
                let [rows, size] = dims(tensor, name, "[rows, size]")?;
                let shape = [rows as usize, size as usize];
                let stored = Stored { host, start, shape, failed: &failed };
                start += rows * size;
                tensors.push((format!("{name}.{layer}"), stored));
            }
        }
        let path = self.path(shard);
        let metadata = HashMap::from([(SETTINGS.to_owned(), self.settings.clone())]);
        file::write_with(&path, |beside| {
            safetensors::serialize_to_file(tensors, Some(metadata), beside)?;
            let failed = failed.get().map(|error| io::Error::other(error.to_string()));
            failed.map_or(Ok(()), |error| Err(error.into()))
        })
        .map_err(|error| match error {
            SafeTensorError::IoError(cause) => Error::File { path: path.clone(), cause },
            cause => Error::Safetensors { path: path.clone(), cause },
        })
    }

    /// One layer's rows of some `shards`, in their order, on `device`: as many files are read at once as there are cores.
    ///
    /// # Errors
    /// [`Error::NoRows`] if `shards` is empty, and what is wrong with the first that is missing or damaged.
    pub fn layer(
        &self,
        layer: usize,
        shards: Range<usize>,
        device: Device,
    ) -> Result<(Tensor, Tensor)> {
        if shards.is_empty() {
            return Err(Error::NoRows { layer });
        }
        let readers = available_parallelism().map_or(1, usize::from).min(shards.len());
        let some = |reader: usize| {
            let [start, end] =
                [reader, reader + 1].map(|n| shards.start + shards.len() * n / readers);
            move || {
                (start..end)
                    .map(|shard| self.shard(shard, layer, device))
                    .collect::<Result<Vec<_>>>()
            }
        };
        let rows = thread::scope(|scope| -> Result<Vec<_>> {
            let readers: Vec<_> = (0..readers).map(|reader| scope.spawn(some(reader))).collect();
            let each = readers
                .into_iter()
                .map(|reader| reader.join().unwrap_or_else(|panic| resume_unwind(panic)));
            Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
        })?;
        let (hidden, scores): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        Ok((Tensor::f_cat(&hidden, 0)?, Tensor::f_cat(&scores, 0)?))
    }

    fn shard(&self, shard: usize, layer: usize, device: Device) -> Result<(Tensor, Tensor)> {
        let shard = Shard::open(self.path(shard), &self.settings)?;
        let hidden = shard.tensor(&format!("hidden.{layer}"), device)?;
        let scores = shard.tensor(&format!("scores.{layer}"), device)?;
        let ([rows, _], [_, heads]) = (
            dims(&hidden, "hidden", "[rows, hidden]")?,
            dims(&scores, "scores", "[rows, kv_heads]")?,
        );
        expect(&scores, "scores", &[rows, heads])?;
        Ok((hidden, scores))
    }
}

/// An open shard: its header is in memory, its tensors are not.
struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data: u64,
}

impl Shard {
    fn open(path: PathBuf, settings: &str) -> Result<Self> {
        let failed = |cause| Error::File { path: path.clone(), cause };
        let damaged = || Error::Damaged { path: path.clone() };
        let file = File::open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 0).map_err(failed)?;
        let size = u64::from_le_bytes(size);
        if size > LONGEST_HEADER.min(length) {
            return Err(damaged());
        }
        let mut header = vec![0; size as usize];
        file.read_exact_at(&mut header, 8).map_err(failed)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|_| damaged())?;
        if 8 + size + header.data_len() as u64 != length {
            return Err(damaged());
        }
        let found = header.metadata().as_ref().and_then(|map| map.get(SETTINGS));
        if found.is_none_or(|found| found != settings) {
            let (expected, found) = (settings.to_owned(), found.cloned().unwrap_or_default());
            return Err(Error::OtherSamples { path, expected, found });
        }
        Ok(Self { path, file, header, data: 8 + size })
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let damaged = || Error::Damaged { path: self.path.clone() };
        let missing = || Error::NoTensor { path: self.path.clone(), tensor: name.to_owned() };
        let TensorInfo { dtype, shape, data_offsets: (start, end) } =
            self.header.info(name).ok_or_else(missing)?;
        let kind = match dtype {
            safetensors::Dtype::F16 => Kind::Half,
            safetensors::Dtype::BF16 => Kind::BFloat16,
            safetensors::Dtype::F32 => Kind::Float,
            _ => return Err(damaged()),
        };
        let numbers = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let wanted = numbers.and_then(|numbers| numbers.checked_mul(kind.elt_size_in_bytes()));
        if wanted != end.checked_sub(*start) || *end > self.header.data_len() {
            return Err(damaged());
        }
        let mut bytes = vec![0; end - start];
        self.file
            .read_exact_at(&mut bytes, self.data + *start as u64)
            .map_err(|cause| Error::File { path: self.path.clone(), cause })?;
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        Ok(Tensor::f_from_data_size(&bytes, &shape, kind)?.f_to_device(device)?)
    }
}

/// Numbers of one kind in host memory, in parts of [`PART`] bytes and a last one.
struct Host {
    parts: Vec<Tensor>,
    kind: Kind,
}

/// Pinned memory comes in powers of two, takes a card's driver 0.3 ms a megabyte to make, and is used again by what fits in.
const PART: i64 = 1 << 26;

impl Host {
    /// Begins to copy `numbers`, all in a row.
    fn copy(numbers: &Tensor) -> Result<Self> {
        let kind = numbers.kind();
        let parts = numbers.f_split(PART / kind.elt_size_in_bytes() as i64, 0)?;
        let host = |part: Tensor| Ok(part.f_to_device_(Device::Cpu, kind, true, false)?);
        Ok(Self { parts: parts.into_iter().map(host).collect::<Result<_>>()?, kind })
    }

    /// The bytes of those numbers that begin at `start`, as many as fit.
    fn bytes(&self, start: i64, bytes: &mut [u8]) -> std::result::Result<(), TchError> {
        let size = self.kind.elt_size_in_bytes();
        let (mut skipped, mut rest) = (start, bytes);
        for part in &self.parts {
            let length = part.numel() as i64;
            if skipped >= length {
                skipped -= length;
                continue;
            }
            let count = (length - skipped).min((rest.len() / size) as i64);
            let (here, later) = rest.split_at_mut(count as usize * size);
            part.f_narrow(0, skipped, count)?.f_copy_data_u8(here, count as usize)?;
            (skipped, rest) = (0, later);
        }
        Ok(())
    }
}

/// A tensor in host memory on its way to a file, a copy at a time: all of a shard's would be its size once more.
///
/// [`View`] knows no failure, so one is left where the writer looks before it keeps the file.
struct Stored<'a> {
    host: &'a Host,
    start: i64,
    shape: [usize; 2],
    failed: &'a OnceCell<TchError>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        dtype(self.host.kind)
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        if let Err(error) = self.host.bytes(self.start, &mut bytes) {
            let _ = self.failed.set(error);
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.host.kind.elt_size_in_bytes()
    }
}

/// Of each kind of tensors, layer by layer, all numbers in a row and in host memory.
///
/// A card copies them in the order of its work, into pinned memory, and is waited for once: a thread that waited for each
/// tensor would each time stand behind all that the others have queued.
fn on_host(kinds: [(&[&Tensor], Kind); 2]) -> Result<[Host; 2]> {
    let row = |tensors: &[&Tensor], kind: Kind| -> Result<Tensor> {
        let flat = tensors.iter().map(|tensor| tensor.f_to_kind(kind)?.f_flatten(0, -1));
        Ok(Tensor::f_cat(&flat.collect::<std::result::Result<Vec<_>, _>>()?, 0)?)
    };
    let finite = |tensor: &Tensor| tensor.f_isfinite()?.f_all();
    let [hidden, scores] = kinds;
    let rows = [row(hidden.0, hidden.1)?, row(scores.0, scores.1)?];
    let all = finite(&rows[0])?.f_logical_and(&finite(&rows[1])?)?;
    let hosts = [Host::copy(&rows[0])?, Host::copy(&rows[1])?];
    if bool::try_from(all)? {
        return Ok(hosts);
    }
    for (layer, (a, b)) in hidden.0.iter().zip(scores.0).enumerate() {
        for (tensor, kind) in [(a, hidden.1), (b, scores.1)] {
            if !bool::try_from(finite(&tensor.f_to_kind(kind)?)?)? {
                return Err(Error::Rows { layer });
            }
        }
    }
    Ok(hosts)
}

fn dtype(kind: Kind) -> safetensors::Dtype {
    match kind {
        Kind::Half => safetensors::Dtype::F16,
        Kind::BFloat16 => safetensors::Dtype::BF16,
        _ => safetensors::Dtype::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_across_parts() {
        let all = Tensor::arange(12, (Kind::Float, Device::Cpu));
        let host = Host { parts: all.split_with_sizes([5, 4, 3], 0), kind: Kind::Float };
        for (start, count) in [(0, 12), (0, 5), (2, 2), (3, 6), (4, 8), (9, 3), (11, 1)] {
            let mut bytes = vec![0; 4 * count];
            host.bytes(start as i64, &mut bytes).unwrap();
            let numbers = bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
            assert!(numbers.eq((start..start + count).map(|n| n as f32)), "{count} from {start}");
        }
    }
}
