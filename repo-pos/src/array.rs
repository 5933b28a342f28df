use crate::{Error, Result};

/// A plain tensor of three dimensions, f32, row-major: what [`Repo`](crate::Repo) reads and writes
/// where no tensor library is.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    data: Vec<f32>,
    shape: [usize; 3],
}

impl Array {
    /// Puts `shape` on `data`; an error unless their sizes agree.
    pub fn new(data: Vec<f32>, shape: [usize; 3]) -> Result<Self> {
        let size = shape.iter().try_fold(1, |size: usize, &dim| size.checked_mul(dim));
        if size != Some(data.len()) {
            return Err(Error::Shape {
                name: "data",
                expected: format!("the product of {shape:?}"),
                found: vec![data.len() as i64],
            });
        }
        Ok(Self { data, shape })
    }

    /// The numbers, last dimension fastest.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The three sizes.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }
}
