// Work on many tensors in few kernels, which tch does not have.

#include <torch/torch.h>

#include <vector>

#include "failure.h"

namespace {

std::vector<torch::Tensor> list(const torch::Tensor* const* tensors, size_t count) {
  std::vector<torch::Tensor> all;
  for (size_t i = 0; i < count; ++i) all.push_back(*tensors[i]);
  return all;
}

}  // namespace

// torch.optim.SGD without dampening, on a GPU, of `count` parameters of one type that share their rates.
extern "C" bool lockstep_fused_sgd(
    const torch::Tensor* const* parameters,
    const torch::Tensor* const* gradients,
    const torch::Tensor* const* momentum_buffers,
    size_t count,
    double lr,
    double weight_decay,
    double momentum,
    bool nesterov,
    lockstep::Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    const torch::NoGradGuard no_grad;
    // Without momentum the kernel wants no buffers, and they stay as they are.
    const std::vector<torch::Tensor> buffers = momentum == 0 ? list(nullptr, 0) : list(momentum_buffers, count);
    at::_fused_sgd_(
        list(parameters, count), list(gradients, count), buffers, weight_decay, momentum, lr,
        /*dampening=*/0, nesterov, /*maximize=*/false, /*is_first_step=*/false);
  });
}

// Copies `count` tensors into others of their shapes.
extern "C" bool lockstep_copy_all(
    const torch::Tensor* const* to, const torch::Tensor* const* from, size_t count, lockstep::Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    const torch::NoGradGuard no_grad;
    at::_foreach_copy_(list(to, count), list(from, count));
  });
}
