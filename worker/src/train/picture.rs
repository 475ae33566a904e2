//! Pictures of the state of training, as PNG.

use super::Number;
use super::error::TrainError;
use super::trainer::Trainer;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use tch::{Device, Kind};

/// The first lane's picture; `None` where the task has none.
pub(crate) fn png<T: Number>(trainer: &Trainer<T>) -> Result<Option<Vec<u8>>, TrainError> {
    let Some(lane) = trainer.lanes().first() else { return Ok(None) };
    let Some(picture) = lane.evaluate(|task| task.picture()).wait()? else { return Ok(None) };
    let (channels, height, width) = picture.size3()?;
    let color = match channels {
        1 => ExtendedColorType::L8,
        3 => ExtendedColorType::Rgb8,
        other => return Err(TrainError::Fatal(format!("a picture of {other} channels cannot be shown"))),
    };
    // [channels, height, width] in 0..1 to rows of pixels in 0..=255.
    let pixels = (picture.f_permute([1, 2, 0])?.f_to_device(Device::Cpu)?.f_mul_scalar(255.0)?.f_round()?)
        .f_to_kind(Kind::Uint8)?;
    let pixels = Vec::<u8>::try_from(pixels.f_contiguous()?.f_view(-1)?)?;
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(&pixels, width as u32, height as u32, color)
        .map_err(|e| TrainError::Fatal(format!("cannot encode a picture: {e}")))?;
    Ok(Some(bytes))
}
