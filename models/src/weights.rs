//! An opened model: its config, and its tensors by their Hugging Face names, whatever file holds
//! them.

mod encoding;
mod half;
mod quants;

use crate::bridge;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::gguf::Gguf;
use crate::overlay::Overlay;
use crate::positions;
use crate::random::Random;
pub(crate) use encoding::{Encoding, READABLE};
use memmap2::Mmap;
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Opens a GGUF file, or a Hugging Face folder (config.json and safetensors), and reads what
/// precedes the weights.
pub fn open(path: &Path) -> Result<Source> {
    let file = std::fs::metadata(path).map_err(|cause| Error::Io {
        path: path.to_owned(),
        cause,
        advice: "give a .gguf file or a Hugging Face folder",
    })?;
    if file.is_dir() {
        Folder::open(path).map(Source::Folder)
    } else {
        Gguf::open(path).map(Source::Gguf)
    }
}

/// Where a model comes from. Its files are mapped, and must not change as long as this lives.
#[derive(Debug)]
#[non_exhaustive]
pub enum Source {
    /// A GGUF file, which also holds the tokenizer and the chat template.
    Gguf(Gguf),
    /// A Hugging Face folder.
    Folder(Folder),
    /// The config of a folder, and a seed for what is not in it.
    Random(Random),
}

impl Source {
    /// The model's shapes and constants.
    pub fn config(&self) -> &Config {
        match self {
            Self::Gguf(gguf) => gguf.config(),
            Self::Folder(folder) => folder.config(),
            Self::Random(random) => random.config(),
        }
    }

    /// The file or folder it was opened from.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Folder(folder) => folder.path(),
            Self::Random(random) => random.path(),
        }
    }

    /// Whether there is a tensor of this Hugging Face name, such as
    /// `model.layers.3.self_attn.q_proj.weight`.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Gguf(gguf) => gguf.has(name),
            Self::Folder(folder) => folder.has(name),
            Self::Random(_) => false,
        }
    }

    /// What someone who loads this should be told, a line each; empty for nearly every model.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Gguf(_) | Self::Random(_) => &[],
            Self::Folder(folder) => folder.notes(),
        }
    }

    /// All tensors that can be read, in the order of their names.
    pub(crate) fn all(&self) -> Vec<Stored<'_>> {
        let mut all: Vec<_> = match self {
            Self::Gguf(gguf) => gguf.all().collect(),
            Self::Folder(folder) => folder.names().filter_map(|n| folder.stored(n).ok()).collect(),
            Self::Random(_) => Vec::new(),
        };
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn stored(&self, name: &str) -> Result<Stored<'_>> {
        match self {
            Self::Gguf(gguf) => gguf.stored(name),
            Self::Folder(folder) => folder.stored(name),
            Self::Random(random) => Err(Error::MissingTensor {
                path: random.path().to_owned(),
                tensor: name.to_owned(),
                advice: "random weights have no learned positions and no overlay",
            }),
        }
    }
}

/// Where a decoder's tensors come from: files, or what is being trained.
pub(crate) trait Tensors {
    fn config(&self) -> &Config;

    /// What tensors are in unless one is asked for in another dtype.
    fn kind(&self) -> Kind;

    fn device(&self) -> Device;

    /// The shape of a tensor as it is stored.
    fn shape(&self, name: &str) -> Result<Vec<usize>>;

    /// A tensor by its Hugging Face name, refused if it has another shape.
    fn tensor_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor>;

    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.tensor_as(name, shape, self.kind())
    }
}

/// The weights of an opened model, in the dtype and on the device of a run.
#[derive(Debug)]
pub struct Weights {
    source: Source,
    overlay: Option<Overlay>,
    config: Config,
    kind: Kind,
    device: Device,
}

impl Weights {
    /// Weights as `kind`: [`Kind::Float`] or [`Kind::BFloat16`]. Nothing is read yet.
    pub fn new(source: Source, kind: Kind, device: Device) -> Result<Self> {
        if !matches!(kind, Kind::Float | Kind::BFloat16) {
            return Err(Error::WeightKind(format!("{kind:?}")));
        }
        Ok(Self { config: source.config().clone(), source, overlay: None, kind, device })
    }

    /// Puts what `overlay` holds in the place of the model's own.
    ///
    /// # Errors
    /// It was made for another model, or lacks what its `pe_config` asks for.
    pub fn overlaid(self, overlay: Overlay) -> Result<Self> {
        let config = overlay.config(&self.source)?;
        Ok(Self { config, overlay: Some(overlay), ..self })
    }

    /// The model's shapes and constants, with what an overlay changes of them.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What they are read from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Their dtype.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where they are put.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Bytes that all of the model's tensors take in this dtype.
    pub fn bytes(&self) -> u64 {
        let size = self.kind.elt_size_in_bytes() as u64;
        if let Source::Random(random) = &self.source {
            let config = random.config();
            let own =
                if config.tied_embeddings { 0 } else { config.vocab_size * config.hidden_size };
            return size * (config.matrix_elements() + own) as u64;
        }
        let elements = |stored: Stored<'_>| {
            stored.shape.iter().map(|&n| n as u64).fold(1, u64::saturating_mul)
        };
        let elements = self.source.all().into_iter().map(elements).fold(0, u64::saturating_add);
        elements.saturating_mul(size)
    }

    /// Reads one tensor by its Hugging Face name, rows of queries and keys in Hugging Face's order.
    ///
    /// Beside the tensor itself only a few hundred kilobytes are held. Errors if it is missing, of
    /// another shape than `shape`, in a type that cannot be read, or not finite throughout.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.tensor_as(name, shape, self.kind)
    }

    /// Whether there is a tensor of this name, in the model or in what is laid over it.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.overlay.as_ref().is_some_and(|overlay| overlay.has(name)) || self.source.has(name)
    }

    fn stored(&self, name: &str) -> Result<Stored<'_>> {
        match &self.overlay {
            Some(overlay) if overlay.has(name) => overlay.stored(name),
            _ => self.source.stored(name),
        }
    }

    /// What `cut` names of the tensor of a name, whose whole shape is `shape`; of a file no more is read, but for the ends of
    /// rows that are cut.
    pub(crate) fn part(
        &self,
        name: &str,
        shape: &[i64],
        cut: Option<&Cut>,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor> {
        if let (Source::Random(random), None) = (&self.source, &self.overlay) {
            let whole = random.tensor(name, shape, kind, device)?;
            let Some(Cut { dimension, range }) = cut else { return Ok(whole) };
            // A copy: else the whole would live on.
            let [from, count] = [range.start, range.len()].map(|n| n as i64);
            return Ok(whole.f_narrow_copy(*dimension as i64, from, count)?);
        }
        let stored = self.stored(name)?;
        if !stored.shape.iter().map(|&n| i64::try_from(n).ok()).eq(shape.iter().map(|&n| Some(n))) {
            return Err(Error::WrongShape {
                path: stored.path.to_owned(),
                tensor: stored.name,
                wanted: shape.to_vec(),
                found: stored.shape,
            });
        }
        stored.read(cut, kind, device)
    }
}

/// A range of a dimension, as whole heads are where rows are reordered.
pub(crate) struct Cut {
    pub dimension: usize,
    pub range: Range<usize>,
}

impl Tensors for Weights {
    fn config(&self) -> &Config {
        &self.config
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match (&self.source, &self.overlay) {
            (Source::Random(_), None) => Ok(positions::published_map(&self.config)),
            _ => Ok(self.stored(name)?.shape),
        }
    }

    fn tensor_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        self.part(name, shape, None, kind, self.device)
    }
}

/// A tensor as it lies in a file.
pub(crate) struct Stored<'a> {
    pub path: &'a Path,
    /// Its name in the file.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// As many as shape and encoding ask for.
    pub bytes: &'a [u8],
    /// Of which file they are.
    pub map: Option<&'a Mmap>,
    /// `Some(head_dim)` if the rows of each head lie interleaved for another rotary pairing.
    pub interleaved: Option<usize>,
}

/// Elements decoded at once: few enough for the second-level cache, and for libtorch to copy
/// without threads of its own.
const CHUNK: usize = 1 << 15;

/// Bytes of a tensor that are decoded in host memory at once on their way to a card.
const STAGE: usize = 64 << 20;

impl Stored<'_> {
    /// All of it, or what `cut` names, on `device`. Another than the CPU gets it piece by piece: the host never holds all of it.
    pub(crate) fn read(&self, cut: Option<&Cut>, kind: Kind, device: Device) -> Result<Tensor> {
        self.read_by(cut, kind, device, (device != Device::Cpu).then_some(STAGE))
    }

    /// The same, by pieces of `stage` bytes if it says so.
    fn read_by(
        &self,
        cut: Option<&Cut>,
        kind: Kind,
        device: Device,
        stage: Option<usize>,
    ) -> Result<Tensor> {
        let mut shape: Vec<i64> = self.shape.iter().map(|&n| n as i64).collect();
        let (rows, columns) = self.matrix();
        let (mut first, mut rows, mut columns) = (0, rows, 0..columns);
        if let Some(Cut { dimension, range }) = cut {
            shape[*dimension] = range.len() as i64;
            // Of a vector, which is one row, columns are cut; so are those of a matrix in its last dimension.
            if *dimension + 1 == shape.len() && columns.len() > 1 {
                columns = range.clone();
            } else {
                let inner = rows / self.shape[0];
                (first, rows) = (range.start * inner, range.len() * inner);
            }
        }
        let out = Tensor::f_empty(&shape, (kind, device))?;
        if rows * columns.len() == 0 {
            return Ok(out);
        }
        let matrix = out.f_view([rows as i64, columns.len() as i64])?;
        let Some(stage) = stage else {
            self.read_part(first, &columns, &matrix)?;
            return Ok(out);
        };
        let at_once = (stage / (columns.len() * kind.elt_size_in_bytes())).clamp(1, rows);
        for start in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - start);
            let mut part = matrix.f_narrow(0, start as i64, count as i64)?;
            let staged = Tensor::f_empty(part.size(), (kind, Device::Cpu))?;
            self.read_part(first + start, &columns, &staged)?;
            part.f_copy_(&staged)?;
            if let Some(map) = self.map {
                let row = self.encoding.bytes(self.matrix().1);
                let from = first + start;
                bridge::forget(map, &self.bytes[row * from..row * (from + count)]);
            }
        }
        Ok(out)
    }

    /// Fills `out`, `[rows, columns]` on the CPU, with these columns of the rows from `first` on, by as many threads as libtorch
    /// has.
    fn read_part(&self, first: usize, columns: &Range<usize>, out: &Tensor) -> Result<()> {
        let rows = out.size()[0] as usize;
        let elements = rows * columns.len();
        let threads = if elements < 8 * CHUNK { 1 } else { tch::get_num_threads().max(1) as usize };
        let share = rows.div_ceil(threads);
        let parts = (0..rows)
            .step_by(share)
            .map(|start| {
                let part = out.f_narrow(0, start as i64, share.min(rows - start) as i64)?;
                Ok((first + start, part))
            })
            .collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let parts = parts.into_iter().map(|(first, part)| {
                let columns = columns.clone();
                scope.spawn(move || self.read_rows(first, columns, &part))
            });
            let running: Vec<_> = parts.collect();
            running.into_iter().try_for_each(|part| {
                part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }

    /// Rows and columns to decode: whole rows, of one element each where a vector is to be
    /// reordered.
    fn matrix(&self) -> (usize, usize) {
        match *self.shape {
            [n] if self.interleaved.is_some() => (n, 1),
            [ref outer @ .., columns] => (outer.iter().product(), columns),
            [] => (1, 1),
        }
    }

    /// Fills `out`, `[rows, columns]`, with these columns of the rows from `first` on.
    fn read_rows(&self, first: usize, columns: Range<usize>, out: &Tensor) -> Result<()> {
        let (rows, width) = (out.size()[0] as usize, self.matrix().1);
        let row_bytes = self.encoding.bytes(width);
        let at_once = (CHUNK / width).clamp(1, rows);
        let mut chunk = vec![0.0; at_once * width];
        for start in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - start);
            let chunk = &mut chunk[..count * width];
            for (row, values) in chunk.chunks_exact_mut(width).enumerate() {
                let row = self.stored_row(first + start + row);
                self.encoding.decode(&self.bytes[row * row_bytes..][..row_bytes], values);
            }
            if !all_finite(chunk) {
                return Err(Error::NotFinite {
                    path: self.path.to_owned(),
                    tensor: self.name.clone(),
                });
            }
            let values = Tensor::f_from_slice(chunk)?.f_view([count as i64, width as i64])?;
            let values = values.f_narrow(1, columns.start as i64, columns.len() as i64)?;
            out.f_narrow(0, start as i64, count as i64)?.f_copy_(&values)?;
        }
        Ok(())
    }

    /// The row in the file of our row `row`: within a head, our first half lies in the even rows,
    /// our second in the odd.
    fn stored_row(&self, row: usize) -> usize {
        let Some(head_dim) = self.interleaved else { return row };
        let (head, row, half) = (row / head_dim, row % head_dim, head_dim / 2);
        head * head_dim + if row < half { 2 * row } else { 2 * (row - half) + 1 }
    }
}

fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    // No early exit, so that it vectorises.
    !values.iter().fold(false, |found, value| found | (value.to_bits() & EXPONENT == EXPONENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_that_comes_in_pieces_is_the_one_that_comes_whole() {
        let numbers: Vec<u8> = (0..8 * 6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &numbers).unwrap();
        let map = bridge::map_file(&file).unwrap();
        let cuts = [None, Some((0, 4..8)), Some((1, 1..4))];
        for interleaved in [None, Some(4)] {
            for cut in &cuts {
                let stored = Stored {
                    path: Path::new("file"),
                    name: "tensor".to_owned(),
                    shape: vec![8, 6],
                    encoding: Encoding::F32,
                    bytes: &map,
                    map: Some(&map),
                    interleaved,
                };
                let cut = cut.clone().map(|(dimension, range)| Cut { dimension, range });
                let read = |stage| stored.read_by(cut.as_ref(), Kind::BFloat16, Device::Cpu, stage);
                let whole = read(None).unwrap();
                for stage in [1, 2 * 6 * 2, 1 << 20] {
                    assert_eq!(read(Some(stage)).unwrap(), whole);
                }
            }
        }
    }
}
