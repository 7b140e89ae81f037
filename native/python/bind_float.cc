#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "array_args.h"
#include "flashmoe/cpu.h"
#include "flashmoe/float_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;
using Cache = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

int64_t dim(const Floats& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }
int64_t size(const Floats& array) { return static_cast<int64_t>(array.size()); }
const float* data(const std::optional<Floats>& array) { return array ? array->data() : nullptr; }

CacheView cache_view(const Cache& cache, int64_t kv_heads, int64_t head_dim) {
  CacheView view;
  const nb::dlpack::dtype half{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  if (cache.dtype() == nb::dtype<float>()) {
    view.type = CacheType::f32;
  } else if (cache.dtype() == nb::dtype<int8_t>()) {
    view.type = CacheType::int8;
  } else {
    require(cache.dtype() == half, "a cache must be float16, float32 or int8");
  }
  view.data = static_cast<uint8_t*>(cache.data());
  view.blocks = static_cast<int64_t>(cache.shape(1));
  view.head_dim = head_dim;
  require(static_cast<int64_t>(cache.shape(0)) == kv_heads &&
              static_cast<int64_t>(cache.shape(2)) * view.element_nbytes() == view.block_nbytes(),
          "a cache must have shape [kv_heads, blocks, block] as in kernels/kv_cache.py");
  return view;
}

void rms_norm(FloatOps& ops, const Floats& x, const Floats& w, float eps, const Floats& out) {
  require(x.ndim() == 2 && size(w) == dim(x, 1) && size(out) == size(x),
          "x [rows, n], w [n] and out must agree");
  nb::gil_scoped_release release;
  ops.rms_norm(x.data(), w.data(), dim(x, 0), dim(x, 1), eps, out.data());
}

void add_rms_norm(FloatOps& ops, const Floats& x, const Floats& delta, const Floats& w, float eps,
                  const Floats& out) {
  require(x.ndim() == 2 && size(w) == dim(x, 1) && size(out) == size(x) && size(delta) == size(x),
          "x [rows, n], delta, w [n] and out must agree");
  nb::gil_scoped_release release;
  ops.add_rms_norm(x.data(), delta.data(), w.data(), dim(x, 0), dim(x, 1), eps, out.data());
}

void gated_rms_norm(FloatOps& ops, const Floats& o, const Floats& z, const Floats& w, float eps,
                    const Floats& out) {
  require(size(w) > 0 && size(o) % size(w) == 0 && size(z) == size(o) && size(out) == size(o),
          "o, z and out must have one size, a multiple of w's");
  nb::gil_scoped_release release;
  ops.gated_rms_norm(o.data(), z.data(), w.data(), size(o) / size(w), size(w), eps, out.data());
}

// Sequence i has the rows up to ends[i] that no earlier one has; each state holds state_size values.
std::vector<SequenceRows> sequence_rows(const std::vector<Floats>& states, const std::vector<int64_t>& ends,
                                        int64_t state_size, int64_t tokens) {
  require(states.size() == ends.size() && (ends.empty() ? 0 : ends.back()) == tokens,
          "one state and one end for each sequence, and no rows behind the last end");
  std::vector<SequenceRows> sequences;
  sequences.reserve(states.size());
  int64_t begin = 0;
  for (size_t i = 0; i < states.size(); ++i) {
    require(begin <= ends[i], "ends must not fall");
    require(size(states[i]) == state_size, "a state has the wrong shape");
    sequences.push_back({states[i].data(), begin, ends[i]});
    begin = ends[i];
  }
  return sequences;
}

void causal_conv1d(FloatOps& ops, const Floats& u, const Floats& w, const std::vector<Floats>& states,
                   const std::vector<int64_t>& ends, const Floats& out) {
  require(u.ndim() == 2 && w.ndim() == 2 && dim(w, 1) == dim(u, 1) && dim(w, 0) >= 2,
          "u [tokens, channels] and w [taps, channels] must agree");
  require(size(out) == size(u), "out must be like u");
  const std::vector<SequenceRows> sequences =
      sequence_rows(states, ends, (dim(w, 0) - 1) * dim(u, 1), dim(u, 0));
  nb::gil_scoped_release release;
  ops.causal_conv1d(u.data(), w.data(), sequences, dim(u, 1), dim(w, 0), out.data());
}

void gated_delta_rule(FloatOps& ops, const Floats& mixed, const Floats& a, const Floats& b,
                      const Floats& a_log, const Floats& dt_bias, const std::vector<Floats>& states,
                      const std::vector<int64_t>& ends, const Floats& out, int64_t key_heads) {
  require(!states.empty() && states[0].ndim() == 3 && mixed.ndim() == 2,
          "mixed [tokens, channels], states [value_heads, key_dim, value_dim]");
  const DeltaShape shape{dim(mixed, 0), key_heads, dim(states[0], 0), dim(states[0], 1), dim(states[0], 2)};
  require(key_heads > 0 && shape.value_heads % key_heads == 0, "key_heads must divide the value heads");
  require(shape.key_dim <= kMaxHeadDim && shape.key_dim % 4 == 0,
          "key_dim must be a multiple of 4, at most 512");
  require(shape.channels() == dim(mixed, 1), "mixed must hold queries, keys and values side by side");
  const int64_t gates = shape.tokens * shape.value_heads;
  require(size(a) == gates && size(b) == gates, "a and b must be [tokens, value_heads]");
  require(size(a_log) == shape.value_heads && size(dt_bias) == shape.value_heads,
          "A_log and dt_bias: [value_heads]");
  require(size(out) == gates * shape.value_dim, "out must be [tokens, value_heads, value_dim]");
  const std::vector<SequenceRows> sequences = sequence_rows(states, ends, size(states[0]), shape.tokens);
  nb::gil_scoped_release release;
  const DeltaCall call{mixed.data(), a.data(), b.data(), a_log.data(), dt_bias.data(), out.data()};
  ops.gated_delta_rule(shape, call, sequences);
}

AttentionShape attention_shape(const Floats& q, const Cache& keys) {
  require(q.ndim() == 3, "q must be [tokens, heads, head_dim]");
  AttentionShape shape;
  shape.tokens = dim(q, 0);
  shape.heads = dim(q, 1);
  shape.kv_heads = static_cast<int64_t>(keys.shape(0));
  shape.head_dim = dim(q, 2);
  require(shape.head_dim > 0 && shape.head_dim <= kMaxHeadDim, "head_dim must be at most 512");
  require(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, "kv_heads must divide the heads");
  return shape;
}

void attention_prepare(FloatOps& ops, const Floats& q_gate, const Floats& k, const Floats& v,
                       const std::optional<Floats>& q_norm, const std::optional<Floats>& k_norm, float eps,
                       const Floats& cos, const Floats& sin, int64_t position, const Floats& q_out,
                       const Cache& keys, const Cache& values) {
  AttentionShape shape = attention_shape(q_out, keys);
  shape.gated = size(q_gate) == 2 * size(q_out);
  require(shape.gated || size(q_gate) == size(q_out),
          "q_gate must be [tokens, heads, head_dim or 2 * head_dim]");
  const CacheView key_view = cache_view(keys, shape.kv_heads, shape.head_dim);
  const CacheView value_view = cache_view(values, shape.kv_heads, shape.head_dim);
  require(cos.ndim() == 2 && size(cos) == size(sin), "cos and sin must be [positions, rotated / 2]");
  shape.rotated = 2 * dim(cos, 1);
  require(shape.rotated <= shape.head_dim, "more dimensions rotated than a head has");
  for (const std::optional<Floats>* norm : {&q_norm, &k_norm}) {
    require(!*norm || size(**norm) == shape.head_dim, "q_norm and k_norm: [head_dim]");
  }
  const int64_t kv = shape.tokens * shape.kv_heads * shape.head_dim;
  require(size(k) == kv && size(v) == kv, "k and v must be [tokens, kv_heads * head_dim]");
  // Differences: position + tokens could overflow.
  const int64_t shortest = std::min({key_view.context(), value_view.context(), dim(cos, 0)});
  require(position >= 0 && position <= shortest - shape.tokens,
          "the positions do not fit the cache or the rotary table");
  nb::gil_scoped_release release;
  ops.attention_prepare(shape, q_gate.data(), k.data(), v.data(), data(q_norm), data(k_norm), eps, cos.data(),
                        sin.data(), position, q_out.data(), key_view, value_view);
}

void attention(FloatOps& ops, const Floats& q, const Cache& keys, const Cache& values, int64_t position,
               const std::optional<Floats>& q_gate, const Floats& out, int64_t window,
               const std::optional<Floats>& sinks) {
  AttentionShape shape = attention_shape(q, keys);
  shape.window = window;
  require(window >= 0, "window must not be negative");
  require(!q_gate || size(*q_gate) == 2 * size(q), "q_gate must be [tokens, heads, 2 * head_dim]");
  require(!sinks || size(*sinks) == shape.heads, "sinks must be [heads]");
  const CacheView key_view = cache_view(keys, shape.kv_heads, shape.head_dim);
  const CacheView value_view = cache_view(values, shape.kv_heads, shape.head_dim);
  require(size(out) == size(q), "out must have q's size");
  require(key_view.type == value_view.type, "keys and values must have one dtype");
  const int64_t shortest = std::min(key_view.context(), value_view.context());
  require(position >= 0 && position <= shortest - shape.tokens, "the positions do not fit the cache");
  nb::gil_scoped_release release;
  ops.attention(shape, q.data(), key_view, value_view, position, data(q_gate), out.data(), data(sinks));
}

// q_out (or q) [tokens, heads, width] and the cache of one head of that width.
LatentShape latent_shape(const Floats& q, int64_t rotated) {
  require(q.ndim() == 3, "absorbed queries must be [tokens, heads, rank + rotated]");
  LatentShape shape;
  shape.tokens = dim(q, 0);
  shape.heads = dim(q, 1);
  shape.rotated = rotated;
  shape.rank = dim(q, 2) - rotated;
  require(shape.heads > 0 && shape.rank > 0 && shape.width() <= kMaxLatent,
          "rank + rotated must be at most 640, rank positive");
  return shape;
}

void mla_prepare(FloatOps& ops, const Floats& q, const Floats& latents, const Floats& norm, float eps,
                 const Floats& cos, const Floats& sin, bool interleaved, int64_t position,
                 const Floats& q_out, const Cache& cache) {
  require(cos.ndim() == 2 && size(cos) == size(sin), "cos and sin must be [positions, rotated / 2]");
  LatentShape shape = latent_shape(q_out, 2 * dim(cos, 1));
  require(
      q.ndim() == 3 && dim(q, 0) == shape.tokens && dim(q, 1) == shape.heads && dim(q, 2) >= shape.rotated,
      "q must be [tokens, heads, nope + rotated]");
  shape.nope = dim(q, 2) - shape.rotated;
  require(size(latents) == shape.tokens * shape.width(), "latents must be [tokens, rank + rotated]");
  require(size(norm) == shape.rank, "norm must be [rank]");
  const CacheView view = cache_view(cache, 1, shape.width());
  require(position >= 0 && position <= std::min(view.context(), dim(cos, 0)) - shape.tokens,
          "the positions do not fit the cache or the rotary table");
  nb::gil_scoped_release release;
  ops.mla_prepare(shape, q.data(), latents.data(), norm.data(), eps, cos.data(), sin.data(), interleaved,
                  position, q_out.data(), view);
}

void mla_attention(FloatOps& ops, const Floats& q, const Cache& cache, int64_t position, float scale,
                   const Floats& out) {
  require(q.ndim() == 3 && out.ndim() == 3 && dim(out, 0) == dim(q, 0) && dim(out, 1) == dim(q, 1) &&
              dim(out, 2) <= dim(q, 2),
          "q must be [tokens, heads, rank + rotated] and out [tokens, heads, rank]");
  const LatentShape shape = latent_shape(q, dim(q, 2) - dim(out, 2));
  const CacheView view = cache_view(cache, 1, shape.width());
  require(position >= 0 && position <= view.context() - shape.tokens, "the positions do not fit the cache");
  nb::gil_scoped_release release;
  ops.mla_attention(shape, q.data(), view, position, scale, out.data());
}

void route(FloatOps& ops, const Floats& logits, int64_t k, const Ints& chosen, const Floats& weights,
           bool renormalise) {
  require(logits.ndim() == 2 && k >= 1 && k <= dim(logits, 1), "logits [tokens, experts], 1 <= k <= experts");
  const int64_t pairs = dim(logits, 0) * k;
  require(static_cast<int64_t>(chosen.size()) == pairs && size(weights) == pairs,
          "chosen and weights must be [tokens, k]");
  bool valid;
  {
    nb::gil_scoped_release release;
    valid = ops.route(logits.data(), dim(logits, 0), dim(logits, 1), k, renormalise, chosen.data(),
                      weights.data());
  }
  if (!valid) throw std::runtime_error("the router computed a value that is not a number");
}

void route_grouped(FloatOps& ops, const Floats& logits, const Floats& bias, int64_t k, int64_t groups,
                   int64_t topk_groups, bool normalise, float scale, const Ints& chosen,
                   const Floats& weights) {
  require(logits.ndim() == 2 && size(bias) == dim(logits, 1), "logits [tokens, experts], bias [experts]");
  const GroupedRouting routing{dim(logits, 1), k, groups, topk_groups, normalise, scale};
  require(groups >= 1 && routing.experts % groups == 0, "groups must divide the experts");
  require(topk_groups >= 1 && topk_groups <= groups, "1 <= topk_groups <= groups");
  require(k >= 1 && k <= routing.experts / groups * topk_groups, "1 <= k <= experts of the best groups");
  const int64_t pairs = dim(logits, 0) * k;
  require(static_cast<int64_t>(chosen.size()) == pairs && size(weights) == pairs,
          "chosen and weights must be [tokens, k]");
  bool valid;
  {
    nb::gil_scoped_release release;
    valid =
        ops.route_grouped(routing, logits.data(), bias.data(), dim(logits, 0), chosen.data(), weights.data());
  }
  if (!valid) throw std::runtime_error("the router computed a value that is not a number");
}

}  // namespace

void bind_float(nb::module_& m) {
  nb::class_<FloatOps>(m, "FloatOps")
      .def(
          "__init__",
          [](FloatOps* self, ThreadPool& pool, const std::string& isa) {
            new (self) FloatOps(pool, parse_isa(isa));
          },
          "pool"_a, "isa"_a, nb::keep_alive<1, 2>())
      .def("rms_norm", &rms_norm, "x"_array, "w"_array, "eps"_a, "out"_array)
      .def("add_rms_norm", &add_rms_norm, "x"_array, "delta"_array, "w"_array, "eps"_a, "out"_array)
      .def("gated_rms_norm", &gated_rms_norm, "o"_array, "z"_array, "w"_array, "eps"_a, "out"_array)
      .def("causal_conv1d", &causal_conv1d, "u"_array, "w"_array, "states"_array, "ends"_a, "out"_array)
      .def("gated_delta_rule", &gated_delta_rule, "mixed"_array, "a"_array, "b"_array, "a_log"_array,
           "dt_bias"_array, "states"_array, "ends"_a, "out"_array, "key_heads"_a)
      .def("attention_prepare", &attention_prepare, "q_gate"_array, "k"_array, "v"_array,
           "q_norm"_array.none(), "k_norm"_array.none(), "eps"_a, "cos"_array, "sin"_array, "position"_a,
           "q_out"_array, "keys"_array, "values"_array)
      .def("attention", &attention, "q"_array, "keys"_array, "values"_array, "position"_a,
           "q_gate"_array.none(), "out"_array, "window"_a = 0, "sinks"_array = nb::none())
      .def("mla_prepare", &mla_prepare, "q"_array, "latents"_array, "norm"_array, "eps"_a, "cos"_array,
           "sin"_array, "interleaved"_a, "position"_a, "q_out"_array, "cache"_array)
      .def("mla_attention", &mla_attention, "q"_array, "cache"_array, "position"_a, "scale"_a, "out"_array)
      .def("route", &route, "logits"_array, "k"_a, "chosen"_array, "weights"_array, "renormalise"_a = true)
      .def("route_grouped", &route_grouped, "logits"_array, "bias"_array, "k"_a, "groups"_a, "topk_groups"_a,
           "normalise"_a, "scale"_a, "chosen"_array, "weights"_array)
      .def_prop_ro("scratch_nbytes", &FloatOps::scratch_nbytes);
}

}  // namespace flashmoe
