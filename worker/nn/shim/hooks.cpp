// Gradients as they become final, and a backward pass whose callbacks may fail.

#include <torch/csrc/autograd/engine.h>
#include <torch/torch.h>

#include "failure.h"

namespace {

using lockstep::CallbackError;
using lockstep::DropError;
using lockstep::Failure;

// A Rust closure. `call` borrows the gradient and returns an error or null.
struct GradientCallback {
  void* context;
  void* (*call)(void* context, torch::Tensor* gradient);
  void (*drop)(void* context);
  DropError drop_error;
};

// Called by the engine once the leaf's gradient is complete. It takes the gradient, so that none is kept.
class GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit GradientHook(GradientCallback callback) : callback_(callback) {}
  GradientHook(const GradientHook&) = delete;
  GradientHook& operator=(const GradientHook&) = delete;
  ~GradientHook() override { callback_.drop(callback_.context); }

  void operator()(const torch::autograd::Variable& leaf) override {
    torch::Tensor gradient = std::exchange(leaf.mutable_grad(), torch::Tensor());
    if (void* error = callback_.call(callback_.context, &gradient)) {
      throw CallbackError(error, callback_.drop_error);
    }
  }

 private:
  GradientCallback callback_;
};

// libtorch's engine runs all backward work of a GPU in one thread, in which two shards that wait for each other would wait
// for ever. Each thread that calls for a backward pass has an engine, and so a thread for each GPU, of its own.
class LaneEngine final : public torch::autograd::Engine {
 public:
  LaneEngine() {
    // The threads of a process's engine are counted once; those of the others have to be started by hand, afterwards.
    Engine::get_base_engine().initialize_device_threads_pool();
    start_device_threads();
  }
  ~LaneEngine() override { stop(); }
};

}  // namespace

extern "C" {

// Takes ownership of the callback, also when it fails.
bool lockstep_on_gradient(torch::Tensor* leaf, GradientCallback callback, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    auto hook = std::make_unique<GradientHook>(callback);
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "a gradient hook needs a leaf that requires a gradient");
    TORCH_CHECK(
        torch::autograd::impl::post_acc_grad_hooks(*leaf) == nullptr, "the leaf has a gradient hook already");
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(hook));
  });
}

bool lockstep_remove_gradient_hook(torch::Tensor* leaf, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] { torch::autograd::impl::set_post_acc_grad_hooks(*leaf, nullptr); });
}

bool lockstep_backward(torch::Tensor* loss, Failure* failure) noexcept {
  return lockstep::guarded(failure, [&] {
    if (loss->is_cpu()) return loss->backward();
    TORCH_CHECK(loss->numel() == 1, "backward starts from a scalar, not from ", loss->sizes());
    static thread_local LaneEngine engine;
    engine.execute(
        {torch::autograd::impl::gradient_edge(*loss)}, {torch::ones_like(*loss)}, /*keep_graph=*/false,
        /*create_graph=*/false, /*accumulate_grad=*/true);
  });
}

}  // extern "C"
