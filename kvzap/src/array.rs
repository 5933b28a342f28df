use crate::{Error, Result};

/// A plain tensor, f32 and row-major: the `T` of [`Scorer`](crate::Scorer) and
/// [`Policy`](crate::Policy) where no tensor library is.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    data: Vec<f32>,
    shape: Vec<usize>,
}

impl Array {
    /// Puts `shape` on `data`, the last dimension fastest; an error unless their sizes agree.
    pub fn new(data: Vec<f32>, shape: &[usize]) -> Result<Self> {
        let size = shape.iter().try_fold(1, |size: usize, &dim| size.checked_mul(dim));
        if size != Some(data.len()) {
            return Err(Error::shape("data", format!("the product of {shape:?}"), &[data.len()]));
        }
        Ok(Self { data, shape: shape.to_vec() })
    }

    /// The numbers, the last dimension fastest.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The shape, if it has `N` dimensions; else an error that calls the array `name` and wants
    /// `expected`.
    pub(crate) fn dims<const N: usize>(
        &self,
        name: &'static str,
        expected: &str,
    ) -> Result<[usize; N]> {
        let wrong = || Error::shape(name, expected.to_owned(), &self.shape);
        self.shape.as_slice().try_into().map_err(|_| wrong())
    }
}
