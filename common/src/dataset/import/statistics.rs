//! Mean and standard deviation of each channel, from sums in integers, so that they are exact until the division
//! and do not depend on the order in which images were looked at.

/// Sums over the pixels of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelSums {
    /// How many pixels.
    pub count: u64,
    /// Their sum, 0 to 255 each.
    pub sum: u64,
    /// The sum of their squares.
    pub squares: u64,
}

impl ChannelSums {
    /// Of `pixels`: at most 2^47 of them, so that the squares fit.
    pub fn of(pixels: impl IntoIterator<Item = u8>) -> Self {
        let mut sums = Self::default();
        for pixel in pixels {
            let value = u64::from(pixel);
            sums.count += 1;
            sums.sum += value;
            sums.squares += value * value;
        }
        sums
    }
}

/// Sums over a dataset, one per channel.
#[derive(Clone, Debug)]
pub(super) struct Statistics {
    channels: Vec<Sums>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: u64,
    sum: u128,
    squares: u128,
}

impl Statistics {
    pub(super) fn new(channels: usize) -> Self {
        Self { channels: vec![Sums::default(); channels] }
    }

    /// Adds an image's sums, one per channel.
    pub(super) fn add(&mut self, image: &[ChannelSums]) {
        for (total, of) in self.channels.iter_mut().zip(image) {
            total.count += of.count;
            total.sum += u128::from(of.sum);
            total.squares += u128::from(of.squares);
        }
    }

    /// Adds an image whose channels lie one after the other.
    pub(super) fn add_planes(&mut self, pixels: &[u8]) {
        let plane = pixels.len() / self.channels.len().max(1);
        let sums: Vec<_> =
            pixels.chunks_exact(plane.max(1)).map(|p| ChannelSums::of(p.iter().copied())).collect();
        self.add(&sums);
    }

    /// Scaled to [0, 1].
    pub(super) fn mean(&self) -> Vec<f64> {
        self.channels.iter().map(|c| c.sum as f64 / c.count as f64 / 255.0).collect()
    }

    /// Of the population: sqrt(E[x²] − E[x]²), scaled to [0, 1].
    pub(super) fn std(&self) -> Vec<f64> {
        let std = |c: &Sums| {
            let n_squared_variance = u128::from(c.count) * c.squares - c.sum * c.sum;
            libm::sqrt(n_squared_variance as f64) / c.count as f64 / 255.0
        };
        self.channels.iter().map(std).collect()
    }
}
