//! The original GAN: discriminator phases, then a generator phase (Goodfellow et al. 2014, algorithm 1).
//!
//! The generator minimizes −log D(G(z)), the non-saturating form of the paper's section 3 and of the authors' code.

use super::{LaneTask, Modules};
use crate::train::error::TrainError;
use crate::train::phase::{PhasePlan, ShardBatch, ShardLoss};
use lockstep_common::job::JobSpec;
use lockstep_nn::forward::Forward;
use lockstep_nn::loss;
use lockstep_nn::models::gan;
use tch::{Kind, Tensor};

const GENERATOR: u16 = 0;
const DISCRIMINATOR: u16 = 1;

/// Keys the sample grid's latent vectors, apart from those of every step.
const GRID_STEP: u64 = u64::MAX;

pub(super) fn phases(discriminator_steps: u32) -> Vec<PhasePlan> {
    let discriminator = |minibatch| PhasePlan {
        name: "discriminator".to_owned(),
        learns: DISCRIMINATOR,
        minibatch,
        figures: &["loss_discriminator", "real_accepted", "fake_accepted"],
    };
    let generator =
        PhasePlan { name: "generator".to_owned(), learns: GENERATOR, minibatch: 0, figures: &["loss"] };
    (0..discriminator_steps as usize).map(discriminator).chain([generator]).collect()
}

pub(super) fn lane(modules: Vec<Modules>, job: &JobSpec) -> Result<Box<dyn LaneTask>, TrainError> {
    let [generator, discriminator]: [Modules; 2] = modules
        .try_into()
        .map_err(|_| TrainError::Fatal("a `gan` job needs a generator and a discriminator".to_owned()))?;
    let latent =
        job.generator.as_ref().and_then(|g| g.options.get("latent")).and_then(serde_json::Value::as_i64);
    Ok(Box::new(Gan {
        generator,
        discriminator,
        latent: latent.unwrap_or(gan::LATENT),
        seed: job.seed,
        grid: i64::from(job.gan.grid),
        image: None,
    }))
}

struct Gan {
    generator: Modules,
    discriminator: Modules,
    latent: i64,
    seed: u64,
    grid: i64,
    /// [channels, height, width] of the real images, once seen.
    image: Option<[i64; 3]>,
}

impl Gan {
    fn latent(&self, step: u64, phase: u16, samples: &[u64]) -> Result<Tensor, TrainError> {
        let z = gan::latent(self.seed, step, phase, samples, self.latent, self.generator.kind)?;
        Ok(z.f_to_device(self.generator.device)?)
    }

    fn discriminator_phase(
        &mut self,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError> {
        let n = batch.samples.len() as i64;
        let z = self.latent(forward.step, forward.phase, &batch.samples)?;
        // The generator is a constant here: no graph, no gradient, no running statistics.
        let fake = tch::no_grad(|| {
            forward.network = GENERATOR;
            forward.update_stats = false;
            let fake = self.generator.frozen.forward(&z, forward).map(|output| output.main);
            forward.update_stats = true;
            fake
        })?;
        forward.network = DISCRIMINATOR;
        let real = self.discriminator.learning.forward(&batch.images.f_view([n, -1])?, forward)?.main;
        let fake = self.discriminator.learning.forward(&fake.f_view([n, -1])?, forward)?.main;
        let loss = loss::discriminator(&real, &fake, batch.global as f64)?;
        let accepted =
            |logits: &Tensor| logits.f_gt(0.0)?.f_sum(Kind::Double)?.f_div_scalar(batch.global as f64);
        let figures = vec![loss.shallow_clone(), accepted(&real)?, accepted(&fake)?];
        Ok(ShardLoss { loss, figures })
    }

    fn generator_phase(
        &mut self,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError> {
        let z = self.latent(forward.step, forward.phase, &batch.samples)?;
        forward.network = GENERATOR;
        let fake = self.generator.learning.forward(&z, forward)?.main;
        // The generator learns through the discriminator, which itself must not change.
        forward.network = DISCRIMINATOR;
        forward.update_stats = false;
        let logits = self.discriminator.frozen.forward(&fake, forward)?.main;
        forward.update_stats = true;
        let loss = loss::generator(&logits, batch.global as f64)?;
        let figures = vec![loss.shallow_clone()];
        Ok(ShardLoss { loss, figures })
    }
}

impl LaneTask for Gan {
    fn forward(
        &mut self,
        phase: &PhasePlan,
        batch: &ShardBatch,
        forward: &mut Forward,
    ) -> Result<ShardLoss, TrainError> {
        if let [_, c, h, w] = batch.images.size()[..] {
            self.image = Some([c, h, w]);
        }
        match phase.learns {
            DISCRIMINATOR => self.discriminator_phase(batch, forward),
            _ => self.generator_phase(batch, forward),
        }
    }

    fn logits(&mut self, _images: &Tensor) -> Result<Tensor, TrainError> {
        Err(TrainError::Fatal("the networks of a `gan` job are no classifiers".to_owned()))
    }

    /// Samples from fixed latent vectors, side by side.
    fn picture(&mut self) -> Result<Option<Tensor>, TrainError> {
        let Some([c, h, w]) = self.image else { return Ok(None) };
        let samples: Vec<u64> = (0..self.grid as u64).collect();
        let z = self.latent(GRID_STEP, 0, &samples)?;
        let images = self.generator.frozen.forward(&z, &mut Forward::evaluation())?.main;
        let side = self.grid.isqrt();
        let grid = images.f_view([side, side, c, h, w])?.f_permute([2, 0, 3, 1, 4])?;
        Ok(Some(grid.f_reshape([c, side * h, side * w])?.f_clamp(0.0, 1.0)?))
    }
}
