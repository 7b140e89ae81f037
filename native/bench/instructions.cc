// Runs one hot kernel a given number of times on fixed inputs: `instructions NAME TIMES`, or `instructions`
// for the names. Counted under callgrind (tools/instruction_budget.py), which knows AVX2 but not AVX-512.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "flashmoe/float_ops.h"
#include "flashmoe/quant_ops.h"
#include "flashmoe/sampler.h"

using namespace flashmoe;

namespace {

constexpr Isa kIsa = Isa::avx2;

std::vector<float> values(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : out) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  }
  return out;
}

struct Tiles {
  TileMatrix shape;
  std::vector<uint8_t> bytes;
};

Tiles tiles(int64_t rows, int64_t cols) {
  Tiles out;
  out.shape.rows = rows;
  out.shape.groups = cols / out.shape.group;
  out.shape.tile_stride = out.shape.tile_nbytes();
  out.bytes.assign(static_cast<size_t>(out.shape.row_tiles() * out.shape.groups * out.shape.tile_stride),
                   0x3c);
  out.shape.tiles = out.bytes.data();
  return out;
}

struct Bench {
  ThreadPool pool{1};
  QuantOps quant{pool, kIsa, true};
  FloatOps floats{pool, kIsa};

  void linear(int64_t tokens, int times) {
    const Tiles w = tiles(256, 2048);
    const std::vector<float> x = values(tokens * 2048);
    std::vector<float> out(static_cast<size_t>(tokens * 256));
    const Matrix matrix = w.shape;
    float* to = out.data();
    for (int i = 0; i < times; ++i) quant.linear(x.data(), tokens, 2048, {&matrix, 1}, {&to, 1}, false);
  }

  void expert(int times) {
    Tiles up = tiles(512, 2048), down = tiles(2048, 512);
    FfnLayout layout;
    layout.hidden = 2048;
    layout.intermediate = 512;
    layout.gate_up = up.shape;
    layout.gate_up.tile_stride *= 2;
    layout.down = down.shape;
    layout.down_offset = 2 * static_cast<int64_t>(up.bytes.size());
    const std::vector<uint8_t> record(3 * up.bytes.size(), 0x3c);
    const std::vector<float> x = values(2048);
    std::vector<float> out(2048);
    TokenInput input;
    quant.prepare(input, x.data(), 1, 2048, 64);
    const ExpertJob job{&layout, &input, record.data(), 0, 1, false};
    const int32_t zero = 0;
    const float one = 1.0f;
    for (int i = 0; i < times; ++i)
      quant.expert_ffn({&job, 1}, {&zero, 1}, {&zero, 1}, {&one, 1}, out.data());
  }

  void delta_rule(int times) {
    const DeltaShape shape{1, 4, 8, 128, 128};
    const std::vector<float> mixed = values(shape.channels()), gates = values(8);
    std::vector<float> state(8 * 128 * 128), out(8 * 128);
    const SequenceRows row{state.data(), 0, 1};
    const float* of = gates.data();
    const DeltaCall call{mixed.data(), of, of, of, of, out.data()};
    for (int i = 0; i < times; ++i) floats.gated_delta_rule(shape, call, {&row, 1});
  }

  void attention(int64_t tokens, int times) {
    const int64_t context = 1024 + tokens;
    const AttentionShape shape{tokens, 8, 1, 256, 64};
    CacheView k{nullptr, CacheType::f16, (context + kCachePositions - 1) / kCachePositions, 256}, v = k;
    std::vector<uint16_t> keys(static_cast<size_t>(k.blocks * k.block_nbytes() / 2), 0x3400), cached(keys);
    k.data = reinterpret_cast<uint8_t*>(keys.data());
    v.data = reinterpret_cast<uint8_t*>(cached.data());
    const std::vector<float> q = values(tokens * 8 * 256), gate = values(tokens * 16 * 256);
    std::vector<float> out(static_cast<size_t>(tokens * 8 * 256));
    for (int i = 0; i < times; ++i) floats.attention(shape, q.data(), k, v, 1024, gate.data(), out.data());
  }

  void norm(int times) {
    const std::vector<float> x = values(2048), w = values(2048);
    std::vector<float> out(2048);
    for (int i = 0; i < times; ++i) floats.rms_norm(x.data(), w.data(), 1, 2048, 1e-6f, out.data());
  }

  void convolution(int times) {
    const std::vector<float> u = values(8192), w = values(4 * 8192);
    std::vector<float> state(3 * 8192), out(8192);
    const SequenceRows row{state.data(), 0, 1};
    for (int i = 0; i < times; ++i) floats.causal_conv1d(u.data(), w.data(), {&row, 1}, 8192, 4, out.data());
  }

  void route(int times) {
    const std::vector<float> logits = values(256);
    int32_t chosen[8];
    float weights[8];
    for (int i = 0; i < times; ++i) floats.route(logits.data(), 1, 256, 8, true, chosen, weights);
  }

  static void sample(const SamplingSettings& settings, int times) {
    const std::vector<float> logits = values(248320);
    Sampler sampler(settings, kIsa);
    for (int i = 0; i < times; ++i) sampler.sample(logits, {});
  }
};

const std::map<std::string, std::function<void(Bench&, int)>> kKernels = {
    {"linear_1_token", [](Bench& b, int n) { b.linear(1, n); }},
    {"linear_8_tokens", [](Bench& b, int n) { b.linear(8, n); }},
    {"linear_64_tokens", [](Bench& b, int n) { b.linear(64, n); }},
    {"expert_ffn", [](Bench& b, int n) { b.expert(n); }},
    {"gated_delta_rule", [](Bench& b, int n) { b.delta_rule(n); }},
    {"attention_1_token", [](Bench& b, int n) { b.attention(1, n); }},
    {"attention_16_tokens", [](Bench& b, int n) { b.attention(16, n); }},
    {"rms_norm", [](Bench& b, int n) { b.norm(n); }},
    {"causal_conv1d", [](Bench& b, int n) { b.convolution(n); }},
    {"route", [](Bench& b, int n) { b.route(n); }},
    {"sample_greedy", [](Bench& b, int n) { b.sample({.temperature = 0.0f}, n); }},
    {"sample_top_k_top_p", [](Bench& b, int n) { b.sample({.top_k = 20, .top_p = 0.95f}, n); }},
    {"sample_top_p", [](Bench& b, int n) { b.sample({.top_p = 0.95f}, n); }},
};

}  // namespace

// The name at which callgrind starts and stops to collect.
extern "C" __attribute__((noinline)) void counted(const std::function<void(Bench&, int)>& run, Bench& bench,
                                                  int times) {
  run(bench, times);
}

int main(int argc, char** argv) {
  if (argc != 3) {
    for (const auto& [name, run] : kKernels) std::puts(name.c_str());
    return argc == 1 ? 0 : 2;
  }
  const auto found = kKernels.find(argv[1]);
  if (found == kKernels.end()) {
    std::fprintf(stderr, "no kernel %s\n", argv[1]);
    return 2;
  }
  const std::vector<Isa> here = supported_isas();
  if (std::find(here.begin(), here.end(), kIsa) == here.end()) {
    std::fprintf(stderr, "the counts are of %s, which this processor does not have\n", isa_name(kIsa));
    return 2;
  }
  Bench bench;
  counted(found->second, bench, std::atoi(argv[2]));
  return 0;
}
