//! Borrowed tensors, so that this crate needs no tensor library.

use crate::error::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements of a [`View`].
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl<'a> From<&'a [f32]> for Data<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a [bf16]> for Data<'a> {
    fn from(data: &'a [bf16]) -> Self {
        Self::Bf16(data)
    }
}

impl<'a> From<&'a [f16]> for Data<'a> {
    fn from(data: &'a [f16]) -> Self {
        Self::F16(data)
    }
}

/// A borrowed `[heads, tokens, dim]`. Rows of `dim` elements are contiguous; the first two strides are free, so a
/// slice or a transpose of a larger tensor needs no copy.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: Data<'a>,
    shape: [usize; 3],
    strides: [usize; 2],
}

impl<'a> View<'a> {
    /// A contiguous tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `data` holds exactly that many elements.
    pub fn new(data: impl Into<Data<'a>>, shape: [usize; 3]) -> Result<Self> {
        let data = data.into();
        check_length("view", data.len(), elements(shape))?;
        Ok(Self { data, shape, strides: [shape[1] * shape[2], shape[2]] })
    }

    /// A tensor of `shape` whose heads and tokens lie `strides` elements apart.
    ///
    /// # Errors
    /// [`Error::Length`] if the last row ends beyond `data`.
    pub fn strided(
        data: impl Into<Data<'a>>,
        shape: [usize; 3],
        strides: [usize; 2],
    ) -> Result<Self> {
        let data = data.into();
        check_end(data.len(), shape, strides)?;
        Ok(Self { data, shape, strides })
    }

    /// `[heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The elements and the strides of heads and tokens.
    pub fn parts(&self) -> (Data<'a>, [usize; 2]) {
        (self.data, self.strides)
    }

    /// Copies one row, widened to f32: for those who implement a cache.
    ///
    /// # Panics
    /// Without that head or token, or if `row` is not as long as one.
    pub fn read(&self, head: usize, token: usize, row: &mut [f32]) {
        let start = head * self.strides[0] + token * self.strides[1];
        let range = start..start + self.shape[2];
        match self.data {
            Data::F32(data) => row.copy_from_slice(&data[range]),
            Data::Bf16(data) => {
                row.iter_mut().zip(&data[range]).for_each(|(to, from)| *to = from.to_f32());
            }
            Data::F16(data) => data[range].convert_to_f32_slice(row),
        }
    }
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F16(data) => data.len(),
        }
    }
}

/// Elements of a [`ViewMut`].
#[derive(Debug)]
pub enum DataMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
}

impl<'a> From<&'a mut [f32]> for DataMut<'a> {
    fn from(data: &'a mut [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a mut [bf16]> for DataMut<'a> {
    fn from(data: &'a mut [bf16]) -> Self {
        Self::Bf16(data)
    }
}

impl<'a> From<&'a mut [f16]> for DataMut<'a> {
    fn from(data: &'a mut [f16]) -> Self {
        Self::F16(data)
    }
}

/// A borrowed, contiguous `[heads, tokens, dim]` to write to.
#[derive(Debug)]
pub struct ViewMut<'a> {
    data: DataMut<'a>,
    shape: [usize; 3],
}

impl<'a> ViewMut<'a> {
    /// A contiguous tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `data` holds exactly that many elements.
    pub fn new(data: impl Into<DataMut<'a>>, shape: [usize; 3]) -> Result<Self> {
        let data = data.into();
        let found = match &data {
            DataMut::F32(data) => data.len(),
            DataMut::Bf16(data) => data.len(),
            DataMut::F16(data) => data.len(),
        };
        check_length("view", found, elements(shape))?;
        Ok(Self { data, shape })
    }

    /// `[heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Writes one row, rounded to the view's type: for those who implement a cache.
    ///
    /// # Panics
    /// Without that head or token.
    pub fn write(&mut self, head: usize, token: usize, row: impl Iterator<Item = f32>) {
        let start = (head * self.shape[1] + token) * self.shape[2];
        let range = start..start + self.shape[2];
        match &mut self.data {
            DataMut::F32(data) => data[range].iter_mut().zip(row).for_each(|(to, x)| *to = x),
            DataMut::Bf16(data) => {
                data[range].iter_mut().zip(row).for_each(|(to, x)| *to = bf16::from_f32(x));
            }
            DataMut::F16(data) => {
                data[range].iter_mut().zip(row).for_each(|(to, x)| *to = f16::from_f32(x));
            }
        }
    }
}

/// Saturates: no slice holds `usize::MAX` elements.
fn elements(shape: [usize; 3]) -> usize {
    shape.iter().fold(1, |product: usize, &n| product.saturating_mul(n))
}

/// Says whether `found` elements reach to the end of a tensor whose heads and tokens lie `strides` elements apart.
pub(crate) fn check_end(found: usize, shape: [usize; 3], strides: [usize; 2]) -> Result<()> {
    let end = if shape.contains(&0) {
        Some(0)
    } else {
        let [heads, tokens] =
            [(shape[0] - 1).checked_mul(strides[0]), (shape[1] - 1).checked_mul(strides[1])];
        heads.zip(tokens).and_then(|(h, t)| h.checked_add(t)?.checked_add(shape[2]))
    };
    match end {
        Some(end) if end <= found => Ok(()),
        end => Err(Error::Length { argument: "view", expected: end.unwrap_or(usize::MAX), found }),
    }
}

pub(crate) fn check_length(argument: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { argument, expected, found }) }
}

pub(crate) fn check_shape(
    tensor: &'static str,
    found: [usize; 3],
    expected: [usize; 3],
) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Shape { tensor, expected, found }) }
}
