// Memory formats, which tch does not know.

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include "failure.h"

using lockstep::Failure;

// A copy of x [N, C, H, W] whose channels are neighbours in memory, for the caller to delete. Its strides say so even where
// C is 1, so that what libtorch computes from it has that layout too.
extern "C" torch::Tensor* lockstep_channels_last(const torch::Tensor* x, Failure* failure) noexcept {
  torch::Tensor* result = nullptr;
  lockstep::guarded(failure, [&] {
    torch::Tensor copy = torch::empty(x->sizes(), x->options().memory_format(torch::MemoryFormat::ChannelsLast));
    copy.copy_(*x);
    result = new torch::Tensor(std::move(copy));
  });
  return result;
}

// A convolution's weight for an input on a GPU that is channels-last: in the same order and in the type in which autocast computes,
// by one kernel instead of two, and its gradient by one less. Null where the weight serves as it is. For the caller to delete.
extern "C" torch::Tensor* lockstep_weight_for(const torch::Tensor* x, const torch::Tensor* weight, Failure* failure) noexcept {
  torch::Tensor* result = nullptr;
  lockstep::guarded(failure, [&] {
    if (!x->is_cuda() || x->suggest_memory_format() != torch::MemoryFormat::ChannelsLast) return;
    const bool casts = weight->scalar_type() == torch::kFloat && at::autocast::is_autocast_enabled(at::kCUDA);
    const auto type = casts ? at::autocast::get_autocast_dtype(at::kCUDA) : weight->scalar_type();
    torch::Tensor copy =
        torch::empty(weight->sizes(), weight->options().dtype(type).memory_format(torch::MemoryFormat::ChannelsLast));
    copy.copy_(*weight);
    result = new torch::Tensor(std::move(copy));
  });
  return result;
}
