// Batch normalization on a GPU, over the global batch or over a shard that is alone, fused with an optional ReLU.

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "merge.h"

namespace lockstep {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor halves(const std::vector<double>& first, const std::vector<double>& second, const torch::TensorOptions& options) {
  std::vector<double> both(first);
  both.insert(both.end(), second.begin(), second.end());
  return to_tensor(both, options);
}

// `count` on the GPU, as the kernels want it: few numbers come, again and again.
Tensor counted(int64_t count, const torch::TensorOptions& options) {
  static thread_local std::map<std::pair<int64_t, int>, Tensor> known;
  Tensor& tensor = known[{count, options.device().index()}];
  if (!tensor.defined()) tensor = torch::full({1}, count, options.dtype(torch::kInt));
  return tensor;
}

double variance(double inverse_std, double eps) { return std::max(1 / (inverse_std * inverse_std) - eps, 0.0); }

class DeviceBatchNorm : public torch::autograd::Function<DeviceBatchNorm> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& gamma,
      const Tensor& beta,
      double eps,
      bool relu,
      c10::intrusive_ptr<Merger> merger,
      Statistics* statistics) {
    const int64_t channels = x.size(1);
    const bool empty = x.numel() == 0;
    double count = static_cast<double>(x.numel()) / static_cast<double>(channels);

    Tensor mean, inverse_std;
    if (empty) {
      mean = torch::zeros({channels}, gamma.options());
      inverse_std = torch::full({channels}, 1 / std::sqrt(eps), gamma.options());
    } else {
      std::tie(mean, inverse_std) = at::batch_norm_stats(x, eps);
    }
    if (merger) {
      std::vector<double> merged = to_vector(torch::cat({mean, inverse_std}));
      for (size_t c = channels; c < merged.size(); ++c) merged[c] = variance(merged[c], eps) * count;
      merged.insert(merged.begin(), count);
      merger->merge(/*backward=*/false, merged);
      const Moments moments(merged, eps);
      count = moments.count;
      const Tensor both = halves(moments.mean, moments.inverse_std, mean.options());
      mean = both.narrow(0, 0, channels);
      inverse_std = both.narrow(0, channels, channels);
    } else {
      statistics->mean = mean;
      statistics->inverse_std = inverse_std;
    }

    Tensor y = empty ? torch::empty_like(x) : at::batch_norm_elemt(x, gamma, beta, mean, inverse_std, eps);
    if (relu) y.relu_();
    ctx->save_for_backward({x, gamma, mean, inverse_std, relu ? y : Tensor()});
    ctx->saved_data["count"] = count;
    if (merger) ctx->saved_data["merger"] = c10::IValue::make_capsule(merger);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &gamma = saved[1], &mean = saved[2], &inverse_std = saved[3], &y = saved[4];
    const int64_t channels = x.size(1);
    const bool empty = x.numel() == 0;
    Tensor dy = gradients[0].to(x.scalar_type()).contiguous(x.suggest_memory_format());
    if (y.defined()) dy = at::threshold_backward(dy, y, 0);

    // Sums of dy and of dy * (x - mean).
    Tensor sum, moment, dgamma, dbeta;
    if (empty) {
      sum = moment = dgamma = dbeta = torch::zeros_like(mean);
    } else {
      std::tie(sum, moment, dgamma, dbeta) = at::batch_norm_backward_reduce(
          dy, x, mean, inverse_std, gamma, /*input_g=*/true, /*weight_g=*/true, /*bias_g=*/true);
    }
    // Every shard takes part, whether or not it needs dx itself.
    if (ctx->saved_data.count("merger") != 0) {
      const auto merger = c10::static_intrusive_pointer_cast<Merger>(ctx->saved_data["merger"].toCapsule());
      const Tensor wide = inverse_std.to(torch::kDouble);
      // [sum of dy, sum of dy * x_hat].
      std::vector<double> sums = to_vector(torch::cat({sum.to(torch::kDouble), moment.to(torch::kDouble) * wide}));
      merger->merge(/*backward=*/true, sums);
      const Tensor both = to_tensor(sums, wide.options());
      sum = both.narrow(0, 0, channels).to(mean.scalar_type());
      moment = (both.narrow(0, channels, channels) / wide).to(mean.scalar_type());
    }
    Tensor dx;
    if (ctx->needs_input_grad(0)) {
      const auto count = static_cast<int64_t>(ctx->saved_data["count"].toDouble());
      dx = empty ? torch::zeros_like(x)
                 : at::batch_norm_backward_elemt(
                       dy, x, mean, inverse_std, gamma, sum, moment, counted(count, x.options()));
    }
    return {dx, dgamma, dbeta, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor device_batch_norm(
    const Tensor& x,
    const Tensor& gamma,
    const Tensor& beta,
    double eps,
    bool relu,
    c10::intrusive_ptr<Merger> merger,
    Statistics* statistics) {
  return DeviceBatchNorm::apply(x, gamma, beta, eps, relu, std::move(merger), statistics);
}

}  // namespace lockstep
