// Batch normalization over the global batch, fused with an optional ReLU.
//
// Every logical shard computes its own sums; a Rust callback replaces them by those of all shards, once in
// forward and once in backward. The gradients of gamma and beta are this shard's share: they are reduced with
// all other gradients. A shard without samples takes part in both exchanges with zeros.

#include <torch/torch.h>

#include <vector>

#include "kernels.h"
#include "merge.h"

namespace {

using lockstep::Affine;
using lockstep::Extent;
using lockstep::Failure;
using lockstep::MergeCallback;
using lockstep::Merger;
using lockstep::Moments;
using lockstep::to_tensor;
using lockstep::to_vector;
using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const lockstep::KernelTable& kernel_table(bool rows) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
  if (avx512) return rows ? lockstep::avx512::row_table : lockstep::avx512::table;
  if (avx2) return rows ? lockstep::avx2::row_table : lockstep::avx2::table;
#endif
  return rows ? lockstep::generic::row_table : lockstep::generic::table;
}

template <class T>
const lockstep::Kernels<T>& kernels(bool rows) {
  if constexpr (std::is_same_v<T, float>) {
    return kernel_table(rows).f32;
  } else {
    return kernel_table(rows).f64;
  }
}

// dx = gamma / std * (g - A - x_hat * B) with A and B the means over the global batch of g and of g * x_hat,
// split into per-channel coefficients of (x - mean).
struct InputGradient {
  std::vector<double> slope;
  std::vector<double> offset;

  InputGradient(const Moments& moments, const std::vector<double>& scale, const std::vector<double>& sums) {
    const size_t channels = scale.size();
    const double share = moments.count > 0 ? 1.0 / moments.count : 0.0;
    for (size_t c = 0; c < channels; ++c) {
      slope.push_back(-scale[c] * moments.inverse_std[c] * sums[channels + c] * share);
      offset.push_back(-scale[c] * sums[c] * share);
    }
  }
};

// gamma / std, per channel.
std::vector<double> scales(const Tensor& gamma, const Moments& moments) {
  std::vector<double> scale = to_vector(gamma);
  for (size_t c = 0; c < scale.size(); ++c) scale[c] *= moments.inverse_std[c];
  return scale;
}

// One implementation per memory layout: the same four passes.
struct Passes {
  virtual ~Passes() = default;
  // [mean[C], M2[C]] of this shard.
  virtual std::vector<double> moments() = 0;
  virtual Tensor normalize() = 0;
  // [sum of g [C], sum of g * (x - mean) [C]] of this shard.
  virtual std::vector<double> gradient_sums(const Tensor& dy) = 0;
  virtual Tensor input_gradient(const Tensor& dy, const InputGradient& gradient) = 0;
};

Extent extent_of(const Tensor& x) {
  int64_t length = 1;
  for (int64_t d = 2; d < x.dim(); ++d) length *= x.size(d);
  return {x.size(0), x.size(1), length};
}

// Whether x lies in memory as rows [N * L, C].
bool is_rows(const Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(torch::MemoryFormat::ChannelsLast);
}

// What normalization needs beside x.
struct Parameters {
  const Moments* moments = nullptr;
  std::vector<double> scale;
  Tensor beta;
  bool relu = false;
};

// f32 or f64 on a CPU, contiguous or channels-last: the fused kernels.
template <class T>
class HostPasses : public Passes {
 public:
  HostPasses(const Tensor& x, const Parameters& parameters)
      : x_(x),
        extent_(extent_of(x)),
        kernels_(kernels<T>(is_rows(x))),
        moments_(parameters.moments),
        relu_(parameters.relu) {
    if (is_rows(x)) extent_ = {extent_.samples * extent_.length, extent_.channels, 1};
    if (moments_ != nullptr) {
      mean_.assign(moments_->mean.begin(), moments_->mean.end());
      scale_.assign(parameters.scale.begin(), parameters.scale.end());
      const std::vector<double> beta = to_vector(parameters.beta);
      beta_.assign(beta.begin(), beta.end());
    }
  }

  std::vector<double> moments() override {
    std::vector<double> out(2 * extent_.channels);
    kernels_.moments(data(x_), extent_, out.data(), out.data() + extent_.channels);
    return out;
  }

  Tensor normalize() override {
    Tensor y = torch::empty_like(x_);
    kernels_.normalize(data(x_), y.template mutable_data_ptr<T>(), extent_, affine());
    return y;
  }

  std::vector<double> gradient_sums(const Tensor& dy) override {
    std::vector<double> out(2 * extent_.channels);
    kernels_.gradient_sums(
        data(x_), data(dy), extent_, affine(), moments_->mean.data(), out.data(), out.data() + extent_.channels);
    return out;
  }

  Tensor input_gradient(const Tensor& dy, const InputGradient& gradient) override {
    const std::vector<T> slope(gradient.slope.begin(), gradient.slope.end());
    const std::vector<T> offset(gradient.offset.begin(), gradient.offset.end());
    Tensor dx = torch::empty_like(x_);
    kernels_.input_gradient(
        data(x_), data(dy), dx.template mutable_data_ptr<T>(), extent_, affine(), slope.data(), offset.data());
    return dx;
  }

 private:
  static const T* data(const Tensor& tensor) { return tensor.template const_data_ptr<T>(); }
  Affine<T> affine() const { return {mean_.data(), scale_.data(), beta_.data(), relu_}; }

  Tensor x_;
  Extent extent_;
  const lockstep::Kernels<T>& kernels_;
  const Moments* moments_;
  bool relu_;
  std::vector<T> mean_, scale_, beta_;
};

// Any other layout or type, through libtorch's own operations; sums in double precision.
class AtenPasses : public Passes {
 public:
  AtenPasses(const Tensor& x, const Parameters& parameters) : x_(x), moments_(parameters.moments), relu_(parameters.relu) {
    if (moments_ != nullptr) {
      const auto arithmetic = x.options().dtype(x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat);
      centred_ = x.to(arithmetic) - per_channel(to_tensor(moments_->mean, arithmetic));
      scale_ = per_channel(to_tensor(parameters.scale, arithmetic));
      value_ = centred_ * scale_ + per_channel(parameters.beta.to(arithmetic));
    }
  }

  std::vector<double> moments() override {
    const Tensor x = rows(x_);
    const int64_t count = std::max<int64_t>(x.size(1), 1);
    const Tensor mean = x.sum(1) / count;
    const Tensor m2 = (x - mean.unsqueeze(1)).square().sum(1);
    return to_vector(torch::cat({mean, m2}));
  }

  Tensor normalize() override { return (relu_ ? value_.relu() : value_).to(x_.options()); }

  std::vector<double> gradient_sums(const Tensor& dy) override {
    const Tensor g = rows(masked(dy));
    return to_vector(torch::cat({g.sum(1), (g * rows(centred_)).sum(1)}));
  }

  Tensor input_gradient(const Tensor& dy, const InputGradient& gradient) override {
    const Tensor slope = per_channel(to_tensor(gradient.slope, centred_.options()));
    const Tensor offset = per_channel(to_tensor(gradient.offset, centred_.options()));
    return (masked(dy) * scale_ + (centred_ * slope + offset)).to(x_.options());
  }

 private:
  // [C, values] in double precision.
  static Tensor rows(const Tensor& tensor) {
    const Tensor by_channel = tensor.to(torch::kDouble).transpose(0, 1);
    return by_channel.reshape({by_channel.size(0), tensor.numel() / std::max<int64_t>(by_channel.size(0), 1)});
  }

  Tensor per_channel(const Tensor& values) const {
    std::vector<int64_t> shape(x_.dim(), 1);
    shape[1] = values.numel();
    return values.view(shape);
  }

  Tensor masked(const Tensor& dy) const {
    const Tensor g = dy.to(value_.options());
    return relu_ ? g.masked_fill(value_ <= 0, 0) : g;
  }

  Tensor x_;
  const Moments* moments_;
  bool relu_;
  Tensor centred_, scale_, value_;
};

std::unique_ptr<Passes> passes(const Tensor& x, const Parameters& parameters) {
  if (x.is_cpu() && (x.is_contiguous() || is_rows(x))) {
    if (x.scalar_type() == torch::kFloat) return std::make_unique<HostPasses<float>>(x, parameters);
    if (x.scalar_type() == torch::kDouble) return std::make_unique<HostPasses<double>>(x, parameters);
  }
  return std::make_unique<AtenPasses>(x, parameters);
}

class GlobalBatchNorm : public torch::autograd::Function<GlobalBatchNorm> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& gamma,
      const Tensor& beta,
      double eps,
      bool relu,
      c10::intrusive_ptr<Merger> merger) {
    const Extent extent = extent_of(x);
    std::vector<double> merged = passes(x, {})->moments();
    merged.insert(merged.begin(), static_cast<double>(extent.samples * extent.length));
    merger->merge(/*backward=*/false, merged);

    const Moments moments(merged, eps);
    ctx->save_for_backward({x, gamma, beta, moments.pack()});
    ctx->saved_data["relu"] = relu;
    ctx->saved_data["merger"] = c10::IValue::make_capsule(merger);
    return passes(x, {&moments, scales(gamma, moments), beta, relu})->normalize();
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &gamma = saved[1], &beta = saved[2];
    const Moments moments(saved[3]);
    const auto merger = c10::static_intrusive_pointer_cast<Merger>(ctx->saved_data["merger"].toCapsule());
    Tensor dy = gradients[0];
    if (x.is_contiguous()) dy = dy.contiguous();
    if (is_rows(x)) dy = dy.contiguous(torch::MemoryFormat::ChannelsLast);
    const std::vector<double> scale = scales(gamma, moments);
    const auto pass = passes(x, {&moments, scale, beta, ctx->saved_data["relu"].toBool()});

    // [sum of g, sum of g * x_hat].
    std::vector<double> sums = pass->gradient_sums(dy);
    const size_t channels = sums.size() / 2;
    for (size_t c = 0; c < channels; ++c) sums[channels + c] *= moments.inverse_std[c];
    const auto split = sums.begin() + channels;
    const Tensor dbeta = to_tensor({sums.begin(), split}, beta.options());
    const Tensor dgamma = to_tensor({split, sums.end()}, gamma.options());

    // Every shard takes part, whether or not it needs dx itself.
    merger->merge(/*backward=*/true, sums);
    Tensor dx;
    if (ctx->needs_input_grad(0)) {
      dx = pass->input_gradient(dy, InputGradient(moments, scale, sums));
    }
    return {dx, dgamma, dbeta, Tensor(), Tensor(), Tensor()};
  }
};

void check(const Tensor& x, const Tensor& gamma, const Tensor& beta) {
  TORCH_CHECK(x.dim() >= 2, "batch norm needs [N, C, ...], got ", x.sizes());
  TORCH_CHECK(
      gamma.numel() == x.size(1) && beta.numel() == x.size(1),
      "batch norm over ", gamma.numel(), " channels got an input of shape ", x.sizes());
}

}  // namespace

// Takes ownership of the callback, also when it fails. The result is the caller's, null after a failure.
extern "C" Tensor* lockstep_batch_norm(
    const Tensor* x,
    const Tensor* gamma,
    const Tensor* beta,
    double eps,
    bool relu,
    MergeCallback callback,
    Failure* failure) noexcept {
  Tensor* y = nullptr;
  lockstep::guarded(failure, [&] {
    auto merger = c10::make_intrusive<Merger>(callback);
    check(*x, *gamma, *beta);
    y = new Tensor(
        x->is_cuda() ? lockstep::device_batch_norm(*x, *gamma, *beta, eps, relu, std::move(merger), nullptr)
                     : GlobalBatchNorm::apply(*x, *gamma, *beta, eps, relu, std::move(merger)));
  });
  return y;
}

// On a GPU, of a shard that is alone: nothing leaves the GPU. Its mean [C] and inverse standard deviation [C] are the
// caller's too.
extern "C" Tensor* lockstep_lone_batch_norm(
    const Tensor* x,
    const Tensor* gamma,
    const Tensor* beta,
    double eps,
    bool relu,
    Tensor** mean,
    Tensor** inverse_std,
    Failure* failure) noexcept {
  Tensor* y = nullptr;
  lockstep::guarded(failure, [&] {
    check(*x, *gamma, *beta);
    lockstep::Statistics own;
    Tensor normalized = lockstep::device_batch_norm(*x, *gamma, *beta, eps, relu, nullptr, &own);
    *mean = new Tensor(std::move(own.mean));
    *inverse_std = new Tensor(std::move(own.inverse_std));
    y = new Tensor(std::move(normalized));
  });
  return y;
}
