#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "array_args.h"
#include "flashmoe/cpu.h"
#include "flashmoe/quant_ops.h"
#include "flashmoe/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Choices = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Addresses = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

TileMatrix tile_matrix(int64_t rows, int64_t cols, int bits, int group, bool f16_scales) {
  require(rows > 0 && cols > 0 && rows < (int64_t{1} << 31) && cols < (int64_t{1} << 31),
          "rows and cols must be positive and below 2^31");
  require(bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8, "bits must be 2, 3, 4, 6 or 8");
  require(group == 32 || group == 64, "group must be 32 or 64");
  require(cols % group == 0, "cols must be a multiple of group");
  require(cols / group <= kMaxGroups, "cols must be at most 2,048 groups");
  TileMatrix w;
  w.rows = rows;
  w.groups = cols / group;
  w.bits = bits;
  w.group = group;
  w.f16_scales = f16_scales;
  w.tile_stride = w.tile_nbytes();
  return w;
}

using Table = std::optional<std::vector<int>>;

void set_table(TileMatrix& w, const Table& table) {
  if (!table) return;
  require(w.bits == 4 && table->size() == 16, "a table has 16 entries and needs 4 bits");
  w.has_table = true;
  for (size_t i = 0; i < 16; ++i) {
    const int entry = (*table)[i];
    require(entry >= 0 && entry <= 127, "the entries of a table must be from 0 to 127");
    w.table[i] = static_cast<uint8_t>(entry);
  }
}

// Keeps the arrays that own its memory alive.
struct Weight {
  Matrix matrix;
  int64_t rows = 0, cols = 0;
  nb::object owner;
  nb::object bias_owner;
};

using Bias = std::optional<Floats>;

const float* bias_of(const Bias& bias, int64_t rows) {
  if (!bias) return nullptr;
  require(static_cast<int64_t>(bias->size()) == rows, "a bias must have one value for each row");
  return bias->data();
}

nb::object owner_of(const Bias& bias) { return bias ? nb::cast(*bias) : nb::none(); }

Weight tile_weight(const Bytes& tiles, int64_t rows, int64_t cols, int bits, int group, bool f16_scales,
                   const Table& table, const Bias& bias) {
  TileMatrix w = tile_matrix(rows, cols, bits, group, f16_scales);
  set_table(w, table);
  w.bias = bias_of(bias, rows);
  require(static_cast<int64_t>(tiles.nbytes()) == w.row_tiles() * w.groups * w.tile_nbytes(),
          "the tiles' size does not match rows, cols, bits and group");
  w.tiles = tiles.data();
  return {w, rows, cols, nb::cast(tiles), owner_of(bias)};
}

Weight dense_weight(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>& data, int64_t rows,
                    int64_t cols, const std::string& type, const Bias& bias) {
  const bool f32 = type == "f32";
  require(f32 || type == "bf16" || type == "f16", "type must be f32, bf16 or f16");
  require(rows > 0 && cols > 0, "rows and cols must be positive");
  require(static_cast<int64_t>(data.nbytes()) == rows * cols * (f32 ? 4 : 2),
          "the data's size does not match");
  const auto kind =
      f32 ? DenseMatrix::Type::f32 : (type == "bf16" ? DenseMatrix::Type::bf16 : DenseMatrix::Type::f16);
  return {DenseMatrix{data.data(), rows, cols, kind, bias_of(bias, rows)}, rows, cols, nb::cast(data),
          owner_of(bias)};
}

FfnLayout ffn_layout(int64_t hidden, int64_t intermediate, std::pair<int, int> gate_up,
                     std::pair<int, int> down, bool f16_gate_up, bool f16_down, const Table& gate_up_table,
                     const Table& down_table, float glu_alpha, float glu_limit, bool biased) {
  FfnLayout layout;
  require(glu_limit >= 0.0f, "glu_limit must not be negative");
  layout.glu_alpha = glu_alpha;
  layout.glu_limit = glu_limit;
  layout.biased = biased;
  layout.hidden = hidden;
  layout.intermediate = intermediate;
  layout.gate_up = tile_matrix(intermediate, hidden, gate_up.first, gate_up.second, f16_gate_up);
  layout.gate_up.tile_stride *= 2;
  set_table(layout.gate_up, gate_up_table);
  const int64_t padded = (intermediate + down.second - 1) / down.second * down.second;
  layout.down = tile_matrix(hidden, padded, down.first, down.second, f16_down);
  set_table(layout.down, down_table);
  layout.down_offset = layout.gate_up.row_tiles() * layout.gate_up.groups * layout.gate_up.tile_stride;
  return layout;
}

int64_t ffn_nbytes(const FfnLayout& layout) {
  const int64_t rows = (2 * layout.gate_up.row_tiles() + layout.down.row_tiles()) * kTileRows;
  return layout.bias_offset() + (layout.biased ? rows * static_cast<int64_t>(sizeof(float)) : 0);
}

void linear(QuantOps& ops, const Floats& x, const std::vector<Weight*>& weights,
            const std::vector<Floats>& outs, bool precise, bool gated) {
  require(x.ndim() == 2, "x must have shape [tokens, cols]");
  require(weights.size() == outs.size() && weights.size() <= kMaxLinearWeights,
          "one out for each weight, at most 8");
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  Matrix matrices[kMaxLinearWeights];
  float* pointers[kMaxLinearWeights];
  for (size_t i = 0; i < weights.size(); ++i) {
    require(weights[i] != nullptr && weights[i]->cols == cols, "x and a weight differ in columns");
    require(static_cast<int64_t>(outs[i].size()) == tokens * weights[i]->rows, "an out has the wrong size");
    matrices[i] = weights[i]->matrix;
    pointers[i] = outs[i].data();
  }
  nb::gil_scoped_release release;
  ops.linear(x.data(), tokens, cols, {matrices, weights.size()}, {pointers, outs.size()}, precise, gated);
}

void logits(QuantOps& ops, const Floats& x, const Weight& weight, const Floats& out) {
  require(x.ndim() == 2, "x must have shape [tokens, cols]");
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  require(weight.cols == cols, "x and the weight differ in columns");
  require(static_cast<int64_t>(out.size()) == tokens * weight.rows, "out has the wrong size");
  nb::gil_scoped_release release;
  ops.logits(x.data(), tokens, cols, weight.matrix, out.data());
}

void head_linear(QuantOps& ops, const Floats& x, const Weight& weight, const Floats& out, bool precise) {
  require(x.ndim() == 3 && out.ndim() == 3 && x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1),
          "x and out must be [tokens, heads, ...] of equal tokens and heads");
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1));
  const int64_t x_width = static_cast<int64_t>(x.shape(2)), out_width = static_cast<int64_t>(out.shape(2));
  require(heads > 0 && weight.rows % heads == 0, "the heads must divide the weight's rows");
  require(weight.cols <= x_width && weight.rows / heads <= out_width, "x or out is narrower than the weight");
  require(!std::holds_alternative<TileMatrix>(weight.matrix) || weight.rows / heads % kTileRows == 0,
          "the rows of a head must be a multiple of 16");
  nb::gil_scoped_release release;
  ops.head_linear(x.data(), tokens, heads, x_width, weight.matrix, out.data(), out_width, precise);
}

void embed(QuantOps& ops, const Weight& table, const Ints& ids, const Floats& out) {
  require(static_cast<int64_t>(out.size()) == static_cast<int64_t>(ids.size()) * table.cols,
          "out must have shape [tokens, cols]");
  for (size_t i = 0; i < ids.size(); ++i) {
    require(ids.data()[i] >= 0 && ids.data()[i] < table.rows, "a token id is outside the table");
  }
  nb::gil_scoped_release release;
  ops.embed(table.matrix, {ids.data(), ids.size()}, out.data());
}

void prepare(QuantOps& ops, TokenInput& input, const Floats& x, int group) {
  require(x.ndim() == 2 && (group == 32 || group == 64), "x must have shape [tokens, cols], group 32 or 64");
  require(x.shape(1) % static_cast<size_t>(group) == 0, "cols must be a multiple of group");
  nb::gil_scoped_release release;
  ops.prepare(input, x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), group);
}

using Shared = std::tuple<const TokenInput*, const FfnLayout*, uintptr_t>;

void require_prepared(const TokenInput& input, const FfnLayout& layout) {
  require(input.cols() == layout.hidden && input.group() == layout.gate_up.group,
          "the input was prepared for another width or group");
}

ExpertJob expert_job(const TokenInput& input, const FfnLayout& layout, uintptr_t address, int64_t begin,
                     int64_t end, bool precise) {
  require(begin <= end && address != 0, "offsets must not fall, addresses must not be 0");
  require_prepared(input, layout);
  return {&layout, &input, reinterpret_cast<const uint8_t*>(address), begin, end - begin, precise};
}

// The block of every token.
ExpertJob shared_job(const Shared& shared, const TokenInput& input, const FfnLayout& layout, int64_t pairs) {
  const auto [own, shape, address] = shared;
  require(own != nullptr && shape != nullptr && shape->hidden == layout.hidden,
          "the shared block has another width");
  require(own->tokens() == input.tokens(), "the inputs differ in tokens");
  return expert_job(*own, *shape, address, 0, pairs, true);
}

// addresses[j] serves the pairs [offsets[j], offsets[j + 1]); `shared`, the block of every token, those
// before.
void expert_ffn(QuantOps& ops, const TokenInput& input, const FfnLayout& layout,
                const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& offsets,
                const Ints& tokens, const Ints& rows, const Floats& out, const std::optional<Floats>& weights,
                const std::optional<Shared>& shared) {
  const int64_t pairs = static_cast<int64_t>(tokens.size());
  require(offsets.size() == addresses.size() + 1 && offsets.back() == pairs &&
              (shared ? offsets.front() >= 0 : offsets.front() == 0),
          "offsets must run from 0 (from the shared block's pairs) to the number of pairs");
  require(rows.size() == tokens.size() && (!weights || weights->size() == tokens.size()),
          "tokens, rows and weights differ in length");
  std::vector<ExpertJob> jobs;
  jobs.reserve(addresses.size() + 1);
  if (shared) {
    jobs.push_back(shared_job(*shared, input, layout, offsets.front()));
  }
  for (size_t j = 0; j < addresses.size(); ++j) {
    jobs.push_back(expert_job(input, layout, addresses[j], offsets[j], offsets[j + 1], false));
  }
  require(out.ndim() == 2 && static_cast<int64_t>(out.shape(1)) == layout.hidden,
          "out must have shape [rows, hidden]");
  const int64_t out_rows = static_cast<int64_t>(out.shape(0));
  for (int64_t p = 0; p < pairs; ++p) {
    require(tokens.data()[p] >= 0 && tokens.data()[p] < input.tokens(), "a token index is out of range");
    require(rows.data()[p] >= 0 && rows.data()[p] < out_rows, "a result row is out of range");
  }
  nb::gil_scoped_release release;
  std::span<const float> factors;
  if (weights) factors = {weights->data(), weights->size()};
  ops.expert_ffn(jobs, {tokens.data(), tokens.size()}, {rows.data(), rows.size()}, factors, out.data());
}

int64_t routed_ffn(QuantOps& ops, const TokenInput& input, const FfnLayout& layout,
                   const Addresses& addresses, const Choices& chosen, const Floats& weights,
                   const Floats& out, int64_t most_pairs, const std::optional<Shared>& shared,
                   const std::optional<Floats>& shared_weights) {
  const int64_t tokens = input.tokens();
  require(static_cast<int64_t>(chosen.shape(0)) == tokens && chosen.shape(1) > 0 &&
              weights.size() == chosen.size(),
          "chosen and weights must have shape [tokens, experts per token]");
  require(out.ndim() == 2 && static_cast<int64_t>(out.shape(0)) == tokens &&
              static_cast<int64_t>(out.shape(1)) == layout.hidden,
          "out must have shape [tokens, hidden]");
  require(shared.has_value() == shared_weights.has_value() &&
              (!shared || static_cast<int64_t>(shared_weights->size()) == tokens),
          "a shared block needs a weight for each token");
  require_prepared(input, layout);
  RoutedFfn call{&input,        &layout,        {addresses.data(), addresses.size()},
                 chosen.data(), weights.data(), static_cast<int64_t>(chosen.shape(1)),
                 most_pairs};
  ExpertJob block;
  if (shared) {
    block = shared_job(*shared, input, layout, tokens);
    call.shared = &block;
    call.shared_weights = shared_weights->data();
  }
  nb::gil_scoped_release release;
  return ops.routed_ffn(call, out.data());
}

void combine(QuantOps& ops, const Floats& y, const Ints& rows, const Floats& weights, const Floats& out) {
  require(y.ndim() == 2 && out.ndim() == 2 && y.shape(1) == out.shape(1),
          "y and out must be 2-D, equal columns");
  require(rows.size() == weights.size() && rows.size() <= y.shape(0), "one row and weight for each y");
  for (size_t p = 0; p < rows.size(); ++p) {
    require(rows.data()[p] >= 0 && rows.data()[p] < static_cast<int64_t>(out.shape(0)),
            "a row is out of range");
  }
  nb::gil_scoped_release release;
  ops.combine(y.data(), static_cast<int64_t>(y.shape(1)), {rows.data(), rows.size()},
              {weights.data(), weights.size()}, out.data());
}

void sigmoid(QuantOps& ops, const Floats& x, const Floats& out) {
  require(x.size() == out.size(), "x and out differ in size");
  nb::gil_scoped_release release;
  ops.sigmoid(x.data(), static_cast<int64_t>(x.size()), out.data());
}

double read_bandwidth(QuantOps& ops, const Bytes& data) {
  nb::gil_scoped_release release;
  return ops.read_bandwidth(data.data(), static_cast<int64_t>(data.nbytes()) / 64 * 64);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("choose_isa", [] {
    const IsaChoice choice = choose_isa();
    return std::make_pair(std::string(isa_name(choice.isa)), choice.reason);
  });
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);
  nb::class_<Weight>(m, "Weight").def_ro("rows", &Weight::rows).def_ro("cols", &Weight::cols);
  m.def("tile_weight", &tile_weight, "tiles"_array, "rows"_a, "cols"_a, "bits"_a, "group"_a, "f16_scales"_a,
        "table"_a = nb::none(), "bias"_array = nb::none());
  m.def("dense_weight", &dense_weight, "data"_array, "rows"_a, "cols"_a, "type"_a, "bias"_array = nb::none());
  nb::class_<FfnLayout>(m, "FfnLayout")
      .def_prop_ro("nbytes", &ffn_nbytes)
      .def_ro("down_offset", &FfnLayout::down_offset);
  m.def("ffn_layout", &ffn_layout, "hidden"_a, "intermediate"_a, "gate_up"_a, "down"_a, "f16_gate_up"_a,
        "f16_down"_a, "gate_up_table"_a = nb::none(), "down_table"_a = nb::none(), "glu_alpha"_a = 0.0f,
        "glu_limit"_a = 0.0f, "biased"_a = false);
  nb::class_<TokenInput>(m, "TokenInput").def(nb::init<>()).def_prop_ro("nbytes", &TokenInput::nbytes);
  nb::class_<QuantOps>(m, "QuantOps")
      .def(
          "__init__",
          [](QuantOps* self, ThreadPool& pool, const std::string& isa, bool int8) {
            new (self) QuantOps(pool, parse_isa(isa), int8);
          },
          "pool"_a, "isa"_a, "int8"_a, nb::keep_alive<1, 2>())
      .def("linear", &linear, "x"_array, "weights"_a, "outs"_array, "precise"_a = false, "gated"_a = false)
      .def("logits", &logits, "x"_array, "weight"_a, "out"_array)
      .def("head_linear", &head_linear, "x"_array, "weight"_a, "out"_array, "precise"_a = false)
      .def("embed", &embed, "table"_a, "ids"_array, "out"_array)
      .def("prepare", &prepare, "input"_a, "x"_array, "group"_a)
      .def("expert_ffn", &expert_ffn, "input"_a, "layout"_a, "addresses"_a, "offsets"_a, "tokens"_array,
           "rows"_array, "out"_array, "weights"_array = nb::none(), "shared"_a = nb::none())
      .def("routed_ffn", &routed_ffn, "input"_a, "layout"_a, "addresses"_array, "chosen"_array,
           "weights"_array, "out"_array, "most_pairs"_a, "shared"_a = nb::none(),
           "shared_weights"_array = nb::none())
      .def("combine", &combine, "y"_array, "rows"_array, "weights"_array, "out"_array)
      .def("sigmoid", &sigmoid, "x"_array, "out"_array)
      .def("read_bandwidth", &read_bandwidth, "data"_array)
      .def("int8_peak", &QuantOps::int8_peak, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("scratch_nbytes", &QuantOps::scratch_nbytes);
}

}  // namespace flashmoe
