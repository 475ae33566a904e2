// GPU streams beside the default one, and copies that nobody waits for. All through c10's virtual interface, whose
// headers, unlike those of c10/cuda, need no CUDA toolkit; without libtorch_cuda each call fails with a reason.

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include "failure.h"

namespace {

using lockstep::Failure;

c10::Device gpu(int32_t index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

}  // namespace

extern "C" {

// A stream of libtorch's pool that never waits for the default one, and its cudaStream_t. It is never destroyed.
bool lockstep_side_stream(int32_t device, int64_t* id, void** handle, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    const c10::Stream stream = cuda.getStreamFromGlobalPool(gpu(device), /*isHighPriority=*/true);
    *id = stream.id();
    *handle = cuda.getStreamNativeHandle(stream);
  });
}

// Makes the calling thread compute on the stream `id`; `previous` is where it did so far.
bool lockstep_exchange_stream(int32_t device, int64_t id, int64_t* previous, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    *previous = cuda.exchangeStream(c10::Stream(c10::Stream::UNSAFE, gpu(device), id)).id();
  });
}

// Copies in order with the current stream. With page-locked memory on the CPU's side the caller does not wait.
bool lockstep_copy_async(torch::Tensor* to, const torch::Tensor* from, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    const torch::NoGradGuard no_grad;
    to->copy_(*from, /*non_blocking=*/true);
  });
}

// Copies page-locked memory to the GPU on the stream `id`, beside what the GPU computes, and waits for that copy. The result is
// for the calling thread's current stream, and for the caller to delete.
bool lockstep_upload(
    const torch::Tensor* from, int32_t device, int64_t id, torch::Tensor** result, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    const torch::NoGradGuard no_grad;
    c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    const c10::Stream current = cuda.getStream(gpu(device)), side(c10::Stream::UNSAFE, gpu(device), id);
    torch::Tensor copy;
    {
      const c10::StreamGuard on_side(side);
      copy = from->to(gpu(device), /*non_blocking=*/true);
    }
    cuda.synchronizeStream(side);
    cuda.recordDataPtrOnStream(copy.storage().data_ptr(), current);
    *result = new torch::Tensor(std::move(copy));
  });
}

// A new vector in page-locked memory, of the type of `like`, for the caller to delete.
bool lockstep_pinned(const torch::Tensor* like, int64_t elements, torch::Tensor** pinned, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    const auto options = torch::TensorOptions().dtype(like->scalar_type()).pinned_memory(true);
    *pinned = new torch::Tensor(torch::empty({elements}, options));
  });
}

}  // extern "C"
