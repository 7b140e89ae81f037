// Every operation on odd shapes, in memory that ends, or begins, at an inaccessible page: masked loads and
// stores are invisible to AddressSanitizer, a page is not.  All instruction sets and thread counts must give
// equal bits; the digest that is printed compares processors (make test-arm).
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "flashmoe/cpu.h"
#include "flashmoe/float_ops.h"
#include "flashmoe/quant_ops.h"
#include "flashmoe/sampler.h"
#include "flashmoe/thread_pool.h"

using namespace flashmoe;

namespace {

enum class Edge { begin, end };

// `count` elements, zero at first, that touch the inaccessible page on one side.
template <class T>
class Exact {
 public:
  Exact(int64_t count, Edge edge) : size_(static_cast<size_t>(count)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), nbytes = size_ * sizeof(T);
    const size_t inner = (nbytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base_ != MAP_FAILED);
    uint8_t* first = static_cast<uint8_t*>(base_) + page;
    if (inner > 0) CHECK(mprotect(first, inner, PROT_READ | PROT_WRITE) == 0);
    data_ = reinterpret_cast<T*>(first + (edge == Edge::end ? inner - nbytes : 0));
  }
  ~Exact() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  Exact(Exact&& other) noexcept
      : size_(other.size_),
        mapped_(other.mapped_),
        base_(std::exchange(other.base_, nullptr)),
        data_(other.data_) {}
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t size_, mapped_;
  void* base_;
  T* data_;
};

// One backend's run: makes inputs, keeps what operations return.
class Run {
 public:
  Run(Isa isa, int threads, bool int8, Edge edge)
      : isa(isa), pool_(threads), quant(pool_, isa, int8), floats(pool_, isa), edge_(edge) {}

  template <class T>
  Exact<T> empty(int64_t count) {
    return Exact<T>(count, edge_);
  }
  Exact<float> random(int64_t count) {
    Exact<float> values(count, edge_);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(next() % 20001) * 1e-4f - 1.0f;
    return values;
  }
  // Random codes; scales and biases between 2^-5 and 2^-3.
  Exact<uint8_t> tiles(int64_t nbytes, int64_t tile_nbytes, bool f16) {
    Exact<uint8_t> bytes(nbytes, edge_);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(next());
    for (int64_t tile = tile_nbytes; tile <= nbytes; tile += tile_nbytes) {
      for (int64_t at = tile - 4 * kTileRows; at < tile; at += 2) {
        const uint16_t half = static_cast<uint16_t>((f16 ? 0x2800u : 0x3d00u) + next() % (f16 ? 2048 : 256));
        std::memcpy(bytes.data() + at, &half, 2);
      }
    }
    return bytes;
  }
  template <class T>
  void keep(const Exact<T>& values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    kept.insert(kept.end(), bytes, bytes + values.size() * sizeof(T));
    ends.emplace_back(kept.size(), section);
  }

  const Isa isa;
  const char* section = "";                          // what runs now
  std::vector<std::pair<size_t, const char*>> ends;  // where the results of each section end

 private:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }

  ThreadPool pool_;  // before its users

 public:
  QuantOps quant;
  FloatOps floats;
  std::vector<uint8_t> kept;

 private:
  Edge edge_;
  uint64_t state_ = 1;
};

void norms(Run& run, int64_t rows, int64_t n) {
  run.section = "norms";
  const auto x = run.random(rows * n), delta = run.random(rows * n), w = run.random(n);
  const auto out = run.empty<float>(rows * n);
  run.floats.rms_norm(x.data(), w.data(), rows, n, 1e-6f, out.data());
  run.keep(out);
  run.floats.add_rms_norm(x.data(), delta.data(), w.data(), rows, n, 1e-6f, out.data());
  run.keep(x);
  run.keep(out);
  run.floats.gated_rms_norm(x.data(), delta.data(), w.data(), rows, n, 1e-6f, out.data());
  run.keep(out);
  run.quant.sigmoid(x.data(), rows * n, out.data());
  run.keep(out);
}

void convolution(Run& run, int64_t tokens, int64_t channels, int64_t taps) {
  run.section = "convolution";
  const auto u = run.random(tokens * channels), w = run.random(taps * channels);
  const auto one = run.random((taps - 1) * channels), other = run.random((taps - 1) * channels);
  const auto out = run.empty<float>(tokens * channels);
  const SequenceRows rows[] = {{one.data(), 0, tokens / 3}, {other.data(), tokens / 3, tokens}};
  run.floats.causal_conv1d(u.data(), w.data(), rows, channels, taps, out.data());
  run.keep(out);
  run.keep(one);
  run.keep(other);
}

void delta_rule(Run& run, const DeltaShape& shape) {
  run.section = "delta rule";
  const int64_t gates = shape.tokens * shape.value_heads;
  const auto mixed = run.random(shape.tokens * shape.channels()), a = run.random(gates),
             b = run.random(gates);
  const auto a_log = run.random(shape.value_heads), dt_bias = run.random(shape.value_heads);
  const int64_t size = shape.value_heads * shape.key_dim * shape.value_dim;
  const auto one = run.random(size), other = run.random(size);
  const auto out = run.empty<float>(gates * shape.value_dim);
  const SequenceRows rows[] = {{one.data(), 0, shape.tokens / 3},
                               {other.data(), shape.tokens / 3, shape.tokens}};
  const DeltaCall call{mixed.data(), a.data(), b.data(), a_log.data(), dt_bias.data(), out.data()};
  run.floats.gated_delta_rule(shape, call, rows);
  run.keep(out);
  run.keep(one);
  run.keep(other);
}

// The cache is exactly full afterwards; what lies before `position` is zero.
void attention(Run& run, const AttentionShape& shape, int64_t position, CacheType type) {
  run.section = "attention";
  const int64_t dim = shape.head_dim, tokens = shape.tokens, context = position + tokens;
  const auto q_gate = run.random(2 * tokens * shape.heads * dim);
  const auto k = run.random(tokens * shape.kv_heads * dim), v = run.random(tokens * shape.kv_heads * dim);
  const auto q_norm = run.random(dim), k_norm = run.random(dim);
  const auto cos = run.random(context * shape.rotated / 2), sin = run.random(context * shape.rotated / 2);
  const auto q = run.empty<float>(tokens * shape.heads * dim),
             out = run.empty<float>(tokens * shape.heads * dim);
  CacheView key_view{nullptr, type, (context + kCachePositions - 1) / kCachePositions, dim};
  CacheView value_view = key_view;
  const int64_t nbytes = shape.kv_heads * key_view.blocks * key_view.block_nbytes();
  const auto keys = run.empty<uint8_t>(nbytes), values = run.empty<uint8_t>(nbytes);
  key_view.data = keys.data();
  value_view.data = values.data();
  run.floats.attention_prepare(shape, q_gate.data(), k.data(), v.data(), q_norm.data(), k_norm.data(), 1e-6f,
                               cos.data(), sin.data(), position, q.data(), key_view, value_view);
  run.floats.attention(shape, q.data(), key_view, value_view, position, q_gate.data(), out.data());
  run.keep(q);
  run.keep(keys);
  run.keep(values);
  run.keep(out);
  run.section = "windows and sinks";
  const auto sinks = run.random(shape.heads);
  for (int64_t window : {1, 20, 300}) {
    AttentionShape narrow = shape;
    narrow.window = window;
    run.floats.attention(narrow, q.data(), key_view, value_view, position, nullptr, out.data(), sinks.data());
    run.keep(out);
  }
}

void latents(Run& run, const LatentShape& shape, int64_t position, CacheType type, bool interleaved) {
  run.section = "latents";
  const int64_t tokens = shape.tokens, heads = shape.heads, context = position + tokens;
  const auto q = run.random(tokens * heads * (shape.nope + shape.rotated));
  const auto rows = run.random(tokens * shape.width()), norm = run.random(shape.rank);
  const auto cos = run.random(context * shape.rotated / 2), sin = run.random(context * shape.rotated / 2);
  const auto absorbed = run.random(tokens * heads * shape.width());
  const auto out = run.empty<float>(tokens * heads * shape.rank);
  CacheView view{nullptr, type, (context + kCachePositions - 1) / kCachePositions, shape.width()};
  const auto cache = run.empty<uint8_t>(view.blocks * view.block_nbytes());
  view.data = cache.data();
  run.floats.mla_prepare(shape, q.data(), rows.data(), norm.data(), 1e-6f, cos.data(), sin.data(),
                         interleaved, position, absorbed.data(), view);
  run.floats.mla_attention(shape, absorbed.data(), view, position, 0.3f, out.data());
  run.keep(absorbed);
  run.keep(cache);
  run.keep(out);
}

void routing(Run& run, int64_t tokens, int64_t experts, int64_t k) {
  run.section = "routing";
  const auto logits = run.random(tokens * experts), weights = run.empty<float>(tokens * k);
  const auto chosen = run.empty<int32_t>(tokens * k);
  CHECK(run.floats.route(logits.data(), tokens, experts, k, true, chosen.data(), weights.data()));
  run.keep(chosen);
  run.keep(weights);
  const auto bias = run.random(experts);
  const int64_t groups = experts % 3 == 0 ? 3 : 1;
  const GroupedRouting routing{experts, k, groups, (groups + 1) / 2, true, 2.5f};
  CHECK(run.floats.route_grouped(routing, logits.data(), bias.data(), tokens, chosen.data(), weights.data()));
  run.keep(chosen);
  run.keep(weights);
}

struct Codec {
  int bits;
  int group;
  bool f16;
  bool table = false;
};

TileMatrix shape_of(const Codec& codec, int64_t rows, int64_t cols) {
  TileMatrix w;
  w.rows = rows;
  w.groups = cols / codec.group;
  w.bits = codec.bits;
  w.group = codec.group;
  w.f16_scales = codec.f16;
  w.tile_stride = w.tile_nbytes();
  w.has_table = codec.table;
  for (int i = 0; i < 16; ++i) w.table[i] = static_cast<uint8_t>(127 - 8 * i);
  return w;
}

void products(Run& run, const Codec& codec, int64_t rows, int64_t cols, int64_t tokens) {
  run.section = "products";
  TileMatrix w = shape_of(codec, rows, cols);
  const auto tiles = run.tiles(w.row_tiles() * w.groups * w.tile_nbytes(), w.tile_nbytes(), codec.f16);
  w.tiles = tiles.data();
  const auto bias = run.random(rows);
  if (codec.table) w.bias = bias.data();
  const int64_t dense_rows = 3;
  const auto f32 = run.random(dense_rows * cols), x = run.random(tokens * cols);
  const auto half = run.empty<uint16_t>(dense_rows * cols);
  for (size_t i = 0; i < half.size(); ++i) half[i] = static_cast<uint16_t>(0x2c00 + i % 500);
  const Matrix matrices[] = {w, DenseMatrix{f32.data(), dense_rows, cols, DenseMatrix::Type::f32},
                             DenseMatrix{half.data(), dense_rows, cols, DenseMatrix::Type::f16},
                             DenseMatrix{half.data(), dense_rows, cols, DenseMatrix::Type::bf16}};
  const auto out = run.empty<float>(tokens * rows), from_f32 = run.empty<float>(tokens * dense_rows);
  const auto from_f16 = run.empty<float>(tokens * dense_rows),
             from_bf16 = run.empty<float>(tokens * dense_rows);
  float* const outs[] = {out.data(), from_f32.data(), from_f16.data(), from_bf16.data()};
  for (int how = 0; how < 3; ++how) {
    run.quant.linear(x.data(), tokens, cols, matrices, outs, how == 1, how == 2);
    for (const Exact<float>* each : {&out, &from_f32, &from_f16, &from_bf16}) run.keep(*each);
  }
  run.quant.logits(x.data(), tokens, cols, matrices[0], out.data());
  run.keep(out);
  const int32_t last[] = {static_cast<int32_t>(rows) - 1, 0}, dense_last[] = {dense_rows - 1, 0};
  const auto row = run.empty<float>(2 * cols);
  if (rows % 32 == 0) {
    const auto by_head = run.empty<float>(tokens * rows);
    run.quant.head_linear(x.data(), tokens / 2, 2, cols, matrices[0], by_head.data(), rows / 2, false);
    run.keep(by_head);
  }
  run.quant.embed(matrices[0], last, row.data());
  run.keep(row);
  for (size_t i = 1; i < 4; ++i) {
    run.quant.embed(matrices[i], dense_last, row.data());
    run.keep(row);
  }
}

FfnLayout layout_of(const Codec& gate_up, const Codec& down, int64_t hidden, int64_t intermediate) {
  FfnLayout layout;
  layout.hidden = hidden;
  layout.intermediate = intermediate;
  layout.gate_up = shape_of(gate_up, intermediate, hidden);
  layout.down_offset = 2 * layout.gate_up.row_tiles() * layout.gate_up.groups * layout.gate_up.tile_nbytes();
  layout.gate_up.tile_stride *= 2;
  layout.down = shape_of(down, hidden, (intermediate + down.group - 1) / down.group * down.group);
  if (gate_up.table) {
    layout.biased = true;
    layout.glu_alpha = 1.7f;
    layout.glu_limit = 0.4f;
  }
  return layout;
}

Exact<uint8_t> record_of(Run& run, const FfnLayout& layout) {
  const TileMatrix& down = layout.down;
  const int64_t down_nbytes = down.row_tiles() * down.groups * down.tile_nbytes();
  const int64_t biases = layout.biased ? (2 * layout.gate_up.row_tiles() + down.row_tiles()) * kTileRows : 0;
  auto record = run.empty<uint8_t>(layout.down_offset + down_nbytes + biases * 4);
  const auto added = run.random(biases);
  std::memcpy(record.data() + layout.down_offset + down_nbytes, added.data(), added.size() * sizeof(float));
  const auto up = run.tiles(layout.down_offset, layout.gate_up.tile_nbytes(), layout.gate_up.f16_scales);
  const auto last = run.tiles(down_nbytes, down.tile_nbytes(), down.f16_scales);
  std::memcpy(record.data(), up.data(), up.size());
  std::memcpy(record.data() + layout.down_offset, last.data(), last.size());
  return record;
}

// Two experts of one shape, one without a token, and a shared block of another; once apart, once summed.
void experts(Run& run, const Codec& gate_up, const Codec& down, int64_t tokens) {
  run.section = "experts";
  const int64_t hidden = 64;
  const FfnLayout layout = layout_of(gate_up, down, hidden, 40);
  const FfnLayout shared = layout_of({8, 64, false}, {4, 32, true}, hidden, 19);
  const auto first = record_of(run, layout), second = record_of(run, layout), block = record_of(run, shared);
  const auto x = run.random(tokens * hidden);
  TokenInput input, shared_input;
  run.quant.prepare(input, x.data(), tokens, hidden, gate_up.group);
  run.quant.prepare(shared_input, x.data(), tokens, hidden, 64);
  const ExpertJob jobs[] = {{&shared, &shared_input, block.data(), 0, tokens, true},
                            {&layout, &input, first.data(), tokens, tokens - 1, false},
                            {&layout, &input, second.data(), 2 * tokens - 1, 0, false},
                            {&layout, &input, second.data(), 2 * tokens - 1, 1, false}};
  const int64_t pairs = 2 * tokens;
  const auto token_of = run.empty<int32_t>(pairs), own_row = run.empty<int32_t>(pairs);
  for (int64_t p = 0; p < pairs; ++p) {
    token_of[static_cast<size_t>(p)] = static_cast<int32_t>(p % tokens);
    own_row[static_cast<size_t>(p)] = static_cast<int32_t>(pairs - 1 - p);
  }
  const std::span<const int32_t> who(token_of.data(), token_of.size()), where(own_row.data(), own_row.size());
  const auto apart = run.empty<float>(pairs * hidden), summed = run.empty<float>(tokens * hidden);
  const auto weights = run.random(pairs), combined = run.empty<float>(tokens * hidden);
  const std::span<const float> factors(weights.data(), weights.size());
  run.quant.expert_ffn(jobs, who, where, {}, apart.data());
  run.quant.expert_ffn(jobs, who, who, factors, summed.data());
  run.keep(apart);
  run.keep(summed);
  for (int64_t p = 0; p < pairs; ++p) {  // back into the order of the pairs
    const float* y = apart.data() + (pairs - 1 - p) * hidden;
    run.quant.combine(y, hidden, who.subspan(static_cast<size_t>(p), 1),
                      factors.subspan(static_cast<size_t>(p), 1), combined.data());
  }
  CHECK(std::memcmp(combined.data(), summed.data(), summed.size() * sizeof(float)) == 0);
}

void float_ops(Run& run) {
  norms(run, 1, 1);
  norms(run, 3, 123);
  norms(run, 7, 64);
  for (int64_t tokens : {0, 1, 2, 5}) {
    convolution(run, tokens, 37, 4);
    delta_rule(run, {tokens, 2, 4, 12, 7});
  }
  convolution(run, 2, 1040, 2);
  delta_rule(run, {3, 1, 1, 128, 32});
  for (CacheType type : {CacheType::f32, CacheType::f16, CacheType::int8}) {
    attention(run, {1, 1, 1, 8, 0}, 0, type);
    attention(run, {2, 20, 2, 24, 6}, 63, type);
    attention(run, {5, 3, 3, 10, 10}, 254, type);
    attention(run, {1, 2, 1, kMaxHeadDim, 128}, 129, type);
    attention(run, {1, 3, 1, 32, 8}, 520, type);
    latents(run, {1, 1, 0, 4, 12}, 0, type, true);
    latents(run, {3, 35, 5, 8, 21}, 300, type, false);
    latents(run, {1, 2, 3, 64, 512}, 40, type, true);
    latents(run, {1, 3, 3, 2, 14}, 2100, type, true);
  }
  routing(run, 1, 1, 1);
  routing(run, 5, 33, 5);
}

void quant_ops(Run& run) {
  for (int bits : {2, 3, 4, 6, 8}) {
    for (int group : {32, 64}) {
      const Codec codec{bits, group, bits % 2 == 0};
      products(run, codec, 1, group, 1);
      products(run, codec, 17, 3 * group, 2);
      products(run, codec, 33, group, 5);
      experts(run, codec, {bits == 2 ? 4 : bits == 4 ? 8 : bits == 8 ? 2 : 3, 96 - group, true}, 3);
    }
  }
  for (int group : {32, 64}) {
    const Codec table{4, group, false, true};
    products(run, table, 1, group, 1);
    products(run, table, 32, 3 * group, 6);
    experts(run, table, {4, 32, false, true}, 3);
  }
  products(run, {4, 64, false}, 16, 64, 70);   // more than one block of tokens
  products(run, {4, 64, false}, 1041, 64, 3);  // more row tiles than logits are sure of
  experts(run, {4, 64, false}, {4, 64, false}, 70);
  const auto bytes = run.empty<uint8_t>(64 * 37);
  CHECK(run.quant.read_bandwidth(bytes.data(), 64 * 37) > 0);
}

void sampling(Run& run) {
  run.section = "sampling";
  const auto logits = run.random(1003);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] *= 9.0f;
  const auto mask = run.empty<uint32_t>(32);
  const auto ids = run.empty<int32_t>(40);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = 0xa53c96f1u * static_cast<uint32_t>(i + 1);
  const std::span<const float> all(logits.data(), logits.size());
  for (const auto& [top_k, top_p, min_p] : {std::tuple{0, 1.0f, 0.0f}, {0, 0.6f, 0.02f}, {7, 0.9f, 0.0f}}) {
    Sampler sampler({0.8f, top_k, top_p, min_p, 0.5f, 0.1f, 1.2f, 3}, run.isa);
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = sampler.sample(all, i % 2 == 0 ? std::span<const uint32_t>() : std::span(mask.data(), 32));
    }
    run.keep(ids);
  }
  const auto sum = run.empty<double>(1);
  sum[0] = top_logprobs(all, 5, run.isa).log_sum;
  run.keep(sum);
}

// What a run kept, and where the results of each section end.
struct Kept {
  Isa isa;
  std::vector<uint8_t> bytes;
  std::vector<std::pair<size_t, const char*>> ends;
};

Kept results(Isa isa, int threads, bool int8, Edge edge) {
  Run run(isa, threads, int8, edge);
  if (int8) float_ops(run);
  if (int8) sampling(run);
  quant_ops(run);
  return {isa, std::move(run.kept), std::move(run.ends)};
}

// True when both kept the same bytes; else says where they begin to differ.
bool same(const Kept& run, const Kept& expected) {
  if (run.bytes == expected.bytes) return true;
  size_t at = 0;
  while (at < run.bytes.size() && run.bytes[at] == expected.bytes[at]) ++at;
  for (const auto& [end, section] : run.ends) {
    if (end <= at) continue;
    std::fprintf(stderr, "%s differs from scalar in: %s\n", isa_name(run.isa), section);
    break;
  }
  return false;
}

uint64_t digest(const std::vector<uint8_t>& bytes, uint64_t hash) {
  for (uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;  // FNV-1a
  return hash;
}

}  // namespace

int main() {
  uint64_t hash = 0xcbf29ce484222325u;
  for (bool int8 : {true, false}) {
    const Kept expected = results(Isa::scalar, 1, int8, Edge::end);
    hash = digest(expected.bytes, hash);
    for (Isa isa : supported_isas()) {
      for (int threads : {1, 3}) {
        for (Edge edge : {Edge::end, Edge::begin}) CHECK(same(results(isa, threads, int8, edge), expected));
      }
    }
  }
  for (Isa isa : supported_isas()) std::printf("%s ", isa_name(isa));
  std::printf("agree: %016llx\n", static_cast<unsigned long long>(hash));
  return 0;
}
