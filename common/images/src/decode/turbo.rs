//! libjpeg-turbo, through its TurboJPEG interface: the only module here with unsafe code.
//!
//! `turbojpeg`, the safe wrapper, cannot decode a part of an image. The accurate integer inverse DCT, the smooth upsampling
//! and the colour conversion give the same bytes with every instruction set; the library's own tests hold it to that.

#![allow(unsafe_code)]

use super::MAX_PIXELS;
use super::jpeg::{self, Colours};
use crate::error::ImageError;
use crate::picture::{Picture, Region};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use turbojpeg_sys as sys;

/// The scans that a progressive JPEG may have. Each costs a pass over all pixels; encoders write about ten.
const MAX_SCANS: c_int = 500;

/// A decompressor and its memory.
#[derive(Debug)]
pub(super) struct Turbo {
    handle: NonNull<c_void>,
    /// The width of a minimum coded unit, the step of a part's left edge, of the last header; `None` where the library
    /// knows no such step and decodes whole images only.
    unit_width: Option<usize>,
}

// SAFETY: a handle is a structure on the heap without ties to a thread, and every use of it takes `&mut self`.
unsafe impl Send for Turbo {}

/// What a JPEG's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) is_cmyk: bool,
}

/// What is decoded: at 1/`denominator` of the size, this region of the smaller image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) denominator: usize,
    pub(super) region: Region,
}

impl Turbo {
    pub(super) fn new() -> Result<Self, ImageError> {
        // SAFETY: takes a constant and returns a handle or null.
        let handle = unsafe { sys::tj3Init(sys::TJINIT_TJINIT_DECOMPRESS as c_int) };
        let handle =
            NonNull::new(handle.cast()).ok_or_else(|| ImageError::Jpeg("out of memory".to_owned()))?;
        let mut turbo = Self { handle, unit_width: None };
        turbo.set(sys::TJPARAM_TJPARAM_MAXPIXELS, MAX_PIXELS as c_int)?;
        turbo.set(sys::TJPARAM_TJPARAM_SCANLIMIT, MAX_SCANS)?;
        Ok(turbo)
    }

    /// Whether damage that libjpeg can work around is an error.
    pub(super) fn set_strict(&mut self, is_strict: bool) -> Result<(), ImageError> {
        self.set(sys::TJPARAM_TJPARAM_STOPONWARNING, is_strict.into())
    }

    pub(super) fn header(&mut self, jpeg: &[u8]) -> Result<Header, ImageError> {
        // SAFETY: the pointer and the length are those of a slice, which the library only reads.
        let code = unsafe { sys::tj3DecompressHeader(self.raw(), jpeg.as_ptr(), jpeg.len() as _) };
        self.check(code)?;
        let [width, height] =
            [sys::TJPARAM_TJPARAM_JPEGWIDTH, sys::TJPARAM_TJPARAM_JPEGHEIGHT].map(|p| self.get(p));
        let (Ok(width), Ok(height)) = (usize::try_from(width), usize::try_from(height)) else {
            return Err(ImageError::Jpeg("its size is not known".to_owned()));
        };
        if self.get(sys::TJPARAM_TJPARAM_PRECISION) != 8 {
            return Err(ImageError::Unsupported("more than 8 bits a channel"));
        }
        let space = self.get(sys::TJPARAM_TJPARAM_COLORSPACE);
        let is_cmyk = space == sys::TJCS_TJCS_CMYK as c_int || space == sys::TJCS_TJCS_YCCK as c_int;
        if self.get(sys::TJPARAM_TJPARAM_LOSSLESS) == 1 {
            // The library decodes it at its full size whatever scale is asked for.
            return Err(ImageError::Unsupported("lossless compression"));
        }
        let known = match self.get(sys::TJPARAM_TJPARAM_SUBSAMP) {
            sys::TJSAMP_TJSAMP_444 | sys::TJSAMP_TJSAMP_440 | sys::TJSAMP_TJSAMP_GRAY => Some(8),
            sys::TJSAMP_TJSAMP_441 => Some(8),
            sys::TJSAMP_TJSAMP_422 | sys::TJSAMP_TJSAMP_420 => Some(16),
            sys::TJSAMP_TJSAMP_411 => Some(32),
            _ => None,
        };
        // One name stands for several sets of factors, and a part begins at whole units of the factors themselves.
        let sampling = jpeg::markers(jpeg).horizontal_sampling;
        self.unit_width = known.filter(|_| sampling.is_power_of_two()).map(|unit| unit.max(8 * sampling));
        Ok(Header { height, width, is_cmyk })
    }

    /// The smallest part that holds `part` and that can be decoded, of the image whose header was read last. `size` is
    /// height and width of all of it at that scale.
    pub(super) fn align(&self, part: Part, size: (usize, usize)) -> Part {
        let Some(unit) = self.unit_width else {
            return Part { region: Region::whole(size.0, size.1), ..part };
        };
        let unit = unit.div_ceil(part.denominator);
        let left = part.region.left / unit * unit;
        let region = Region { left, width: part.region.left - left + part.region.width, ..part.region };
        Part { region, ..part }
    }

    /// Decodes an aligned part.
    pub(super) fn decode(
        &mut self,
        jpeg: &[u8],
        part: Part,
        colours: Colours,
    ) -> Result<Picture, ImageError> {
        let header = self.header(jpeg)?;
        let scale = sys::tjscalingfactor { num: 1, denom: part.denominator as c_int };
        // SAFETY: takes numbers, and refuses those that it does not know.
        let code = unsafe { sys::tj3SetScalingFactor(self.raw(), scale) };
        self.check(code)?;
        let size = [header.height, header.width].map(|n| n.div_ceil(part.denominator));
        let Region { top, left, height, width } = part.region;
        let is_whole = part.region == Region::whole(size[0], size[1]);
        let region = match is_whole {
            true => sys::tjregion { x: 0, y: 0, w: 0, h: 0 },
            false => {
                sys::tjregion { x: left as c_int, y: top as c_int, w: width as c_int, h: height as c_int }
            }
        };
        // SAFETY: takes numbers, and refuses those that do not lie within the image of the header that it has read.
        let code = unsafe { sys::tj3SetCroppingRegion(self.raw(), region) };
        self.check(code)?;
        let channels = colours.channels();
        let format = if channels == 3 { sys::TJPF_TJPF_RGB } else { sys::TJPF_TJPF_CMYK };
        let mut values = vec![0; height * width * channels];
        let pitch = (width * channels) as c_int;
        // SAFETY: the library writes `height` rows of `pitch` bytes: the region's if there is one, and otherwise those of
        // the whole image at this scale, whose size it computes as `size` is computed above, from the same bytes: it
        // ignores the scale of lossless images only, which `header` has refused. It reads `jpeg` only, and jumps over
        // none of our frames on an error.
        let code = unsafe {
            sys::tj3Decompress8(
                self.raw(),
                jpeg.as_ptr(),
                jpeg.len() as _,
                values.as_mut_ptr(),
                pitch,
                format,
            )
        };
        self.check(code)?;
        Picture::new(channels, height, width, values)
    }

    fn raw(&self) -> sys::tjhandle {
        self.handle.as_ptr().cast()
    }

    fn set(&mut self, parameter: sys::TJPARAM, value: c_int) -> Result<(), ImageError> {
        // SAFETY: takes numbers, and refuses those that it does not know.
        let code = unsafe { sys::tj3Set(self.raw(), parameter as c_int, value) };
        self.check(code)
    }

    fn get(&self, parameter: sys::TJPARAM) -> c_int {
        // SAFETY: reads a number of the handle; −1 if there is none.
        unsafe { sys::tj3Get(self.raw(), parameter as c_int) }
    }

    /// The error that a call's result stands for.
    fn check(&self, code: c_int) -> Result<(), ImageError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the text is the handle's, ends with a zero and stays until the next call, which `self` does not make here.
        let text = unsafe { CStr::from_ptr(sys::tj3GetErrorStr(self.raw())) };
        let text = text.to_string_lossy().replace('\n', " ");
        // SAFETY: reads a number of the handle.
        let is_warning = unsafe { sys::tj3GetErrorCode(self.raw()) } == sys::TJERR_TJERR_WARNING as c_int;
        let is_strict = self.get(sys::TJPARAM_TJPARAM_STOPONWARNING) == 1;
        if is_warning && !is_strict {
            return Ok(());
        }
        Err(ImageError::Jpeg(text))
    }
}

/// Whether that is a warning of bytes between the last scan and the end of an image. Some cameras and programs leave some
/// there; nothing can follow it that would harm a pixel.
pub(super) fn is_left_over(error: &ImageError) -> bool {
    matches!(error, ImageError::Jpeg(text) if text.contains("extraneous bytes before marker 0xd9"))
}

impl Drop for Turbo {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and nobody has it after this.
        unsafe { sys::tj3Destroy(self.raw()) }
    }
}
