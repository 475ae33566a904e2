// Memory formats, which tch does not know.

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
