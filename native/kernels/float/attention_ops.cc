// Attention split over the pool: by tokens for a prompt, by keys for few tokens and a long context.
#include <algorithm>
#include <cmath>

#include "flashmoe/float_ops.h"
#include "flashmoe/work_split.h"

namespace flashmoe {
namespace {

// Tokens of a prompt that pass over a block of keys together, while it is in the second-level cache.
constexpr int64_t kTokensPerTask = 16;
// Enough that a thread which comes late or is taken away costs little.
constexpr int64_t kTasksPerThread = 8;

// One call's work: a unit is one token and the query heads of it that share a pass over keys and values.
struct Attention {
  const FloatKernels& kernels;
  AttentionShape shape;
  const float* q;
  CacheView keys, values;
  int64_t position;
  const float* q_gate;
  const float* sinks;
  float* out;

  int64_t group() const { return shape.heads / shape.kv_heads; }
  int64_t parts() const { return tasks_of(group(), kHeadsPerTask); }
  int64_t lanes() const { return shape.kv_heads * parts(); }  // units of a token
  int64_t first_key(int64_t token) const {
    return shape.window > 0 ? std::max<int64_t>(0, position + token + 1 - shape.window) : 0;
  }
  // A token's blocks of keys: first_block(token) .. blocks(token) - 1.
  int64_t first_block(int64_t token) const { return first_key(token) / kKeyBlock; }
  int64_t blocks(int64_t token) const { return tasks_of(position + token + 1, kKeyBlock); }
  int64_t first_head(int64_t lane) const { return lane / parts() * group() + lane % parts() * kHeadsPerTask; }
  int64_t heads(int64_t lane) const {
    return std::min(kHeadsPerTask, group() - lane % parts() * kHeadsPerTask);
  }

  const float* q_at(int64_t token, int64_t lane) const {
    return q + (token * shape.heads + first_head(lane)) * shape.head_dim;
  }
  const float* q_gate_at(int64_t token, int64_t lane) const {
    return q_gate == nullptr ? nullptr
                             : q_gate + (token * shape.heads + first_head(lane)) * 2 * shape.head_dim;
  }
  float* out_at(int64_t token, int64_t lane) const {
    return out + (token * shape.heads + first_head(lane)) * shape.head_dim;
  }

  AttentionTask task(int64_t token, int64_t lane, int64_t block) const {
    AttentionTask task;
    task.q = q_at(token, lane);
    task.keys = keys;
    task.values = values;
    task.kv_head = lane / parts();
    task.heads = heads(lane);
    // Blocks of the cache that lie before the window are not read; the rest of its first one is masked.
    const int64_t begin = first_key(token);
    task.first = std::max(block * kKeyBlock, begin / kCachePositions * kCachePositions);
    task.skip = std::max<int64_t>(0, begin - task.first);
    task.count = std::min((block + 1) * kKeyBlock, position + token + 1) - task.first;
    task.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    return task;
  }

  void finish(int64_t token, int64_t lane, const AttentionPart& total) const {
    const float* gate = q_gate_at(token, lane);
    kernels.finish_attention(total, gate == nullptr ? nullptr : gate + shape.head_dim,
                             sinks == nullptr ? nullptr : sinks + first_head(lane), heads(lane),
                             shape.head_dim);
  }
};

// The part of one unit and one block in memory.
struct PartBuffer {
  float* base;
  int64_t stride;  // of a head's values

  static constexpr int64_t floats(int64_t head_dim) {
    return kHeadsPerTask * (CacheView::padded(head_dim) + 2);
  }
  AttentionPart view() const {
    return {base + stride * kHeadsPerTask, base + (stride + 1) * kHeadsPerTask, base, stride};
  }
};

// A unit's sum of parts; the values are summed where the result will be.
class Total {
 public:
  Total() = default;
  Total(const Attention& call, int64_t token, int64_t lane)
      : acc_(call.out_at(token, lane)), heads_(call.heads(lane)), dim_(call.shape.head_dim) {}
  AttentionPart view() { return {max_, sum_, acc_, dim_}; }

  void add(const FloatKernels& kernels, const AttentionPart& part, bool first) {
    if (!first) return kernels.merge_parts(view(), part, heads_, dim_);
    std::copy_n(part.max, heads_, max_);
    std::copy_n(part.sum, heads_, sum_);
    for (int64_t h = 0; h < heads_; ++h) std::copy_n(part.acc + h * part.stride, dim_, acc_ + h * dim_);
  }

 private:
  float max_[kHeadsPerTask], sum_[kHeadsPerTask];
  float* acc_ = nullptr;
  int64_t heads_ = 0, dim_ = 0;
};

// Every block of keys meets all tokens while it is in the second-level cache.
void run_tokens(const Attention& call, int64_t lane, int64_t first, int64_t end) {
  alignas(64) float memory[PartBuffer::floats(kMaxHeadDim)];
  Total totals[kTokensPerTask];
  for (int64_t t = first; t < end; ++t) totals[t - first] = Total(call, t, lane);
  const int64_t dim = call.shape.head_dim,
                width = call.heads(lane) * dim * static_cast<int64_t>(sizeof(float));
  const AttentionPart part = PartBuffer{memory, CacheView::padded(dim)}.view();
  for (int64_t block = call.first_block(first); block < call.blocks(end - 1); ++block) {
    for (int64_t t = first; t < end; ++t) {
      if (block < call.first_block(t) || block >= call.blocks(t)) continue;
      Total& total = totals[t - first];
      AttentionTask task = call.task(t, lane, block);
      const bool begins = block == call.first_block(t);
      if (begins) task.with_scores = {call.q_at(std::min(t + 1, end - 1), lane), width};
      if (block + 1 == call.blocks(t) && call.q_gate != nullptr) {
        task.with_values = {call.q_gate_at(t, lane), 2 * width};
      }
      // The first part needs no addition, and no copy where heads lie as the kernel writes them.
      const bool in_place = begins && dim == CacheView::padded(dim);
      call.kernels.attend(task, in_place ? total.view() : part);
      if (!in_place) total.add(call.kernels, part, begins);
    }
  }
  for (int64_t t = first; t < end; ++t) call.finish(t, lane, totals[t - first].view());
}

// Parts of some blocks of keys for one unit, one long read of the cache.  scratch: of the unit's first block.
void run_blocks(const Attention& call, int64_t token, int64_t lane, int64_t first, int64_t end,
                float* scratch) {
  const int64_t dim = call.shape.head_dim;
  for (int64_t block = first; block < end; ++block) {
    AttentionTask task = call.task(token, lane, block);
    const int64_t steps = kKeyBlock / kCachePositions;
    task.with_scores = {call.values.block(task.kv_head, task.first), steps * call.values.block_nbytes()};
    if (block + 1 < end) {
      const int64_t next = (block + 1) * kKeyBlock;
      task.with_values = {call.keys.block(task.kv_head, next), steps * call.keys.block_nbytes()};
    }
    const int64_t at = block - call.first_block(token);
    const PartBuffer buffer{scratch + at * PartBuffer::floats(dim), CacheView::padded(dim)};
    call.kernels.attend(task, buffer.view());
  }
}

// As run_tokens, over the parts that run_blocks left.
void merge_blocks(const Attention& call, int64_t token, int64_t lane, float* scratch) {
  Total total(call, token, lane);
  const int64_t dim = call.shape.head_dim;
  const int64_t blocks = call.blocks(token) - call.first_block(token);
  for (int64_t at = 0; at < blocks; ++at) {
    const PartBuffer buffer{scratch + at * PartBuffer::floats(dim), CacheView::padded(dim)};
    total.add(call.kernels, buffer.view(), at == 0);
  }
  call.finish(token, lane, total.view());
}

// Keys split over the threads for one token.
void run_keys(ThreadPool& pool, GrowOnly<float>& scratch, const Attention& call, int64_t token) {
  const int64_t lanes = call.lanes(), begin = call.first_block(token), blocks = call.blocks(token) - begin;
  const int64_t part = PartBuffer::floats(call.shape.head_dim);
  const int64_t step = tasks_of(blocks, std::min(blocks, tasks_of(kTasksPerThread * pool.threads(), lanes)));
  const int64_t runs = tasks_of(blocks, step);
  float* parts = scratch.at_least(lanes * blocks * part);
  pool.parallel_for(lanes * runs, [&](int64_t task) {
    const int64_t lane = task / runs, first = task % runs * step;
    run_blocks(call, token, lane, begin + first, begin + std::min(first + step, blocks),
               parts + lane * blocks * part);
  });
  pool.parallel_for(lanes,
                    [&](int64_t lane) { merge_blocks(call, token, lane, parts + lane * blocks * part); });
}

}  // namespace

void FloatOps::attention_prepare(const AttentionShape& shape, const float* q_gate, const float* k,
                                 const float* v, const float* q_norm, const float* k_norm, float eps,
                                 const float* cos, const float* sin, int64_t position, float* q_out,
                                 const CacheView& keys, const CacheView& values) {
  const int64_t dim = shape.head_dim, half = shape.rotated / 2, q_step = shape.gated ? 2 * dim : dim;
  const auto normalise = [&](const float* x, const float* norm, float* y) {
    if (norm != nullptr) return kernels_.rms_norm(x, norm, dim, eps, y);
    std::copy_n(x, dim, y);
  };
  const auto prepare = [&](int64_t t) {
    const float* c = cos + (position + t) * half;
    const float* s = sin + (position + t) * half;
    for (int64_t h = 0; h < shape.heads; ++h) {
      float* q = q_out + (t * shape.heads + h) * dim;
      normalise(q_gate + (t * shape.heads + h) * q_step, q_norm, q);
      kernels_.rope(q, c, s, half);
    }
    float key[kMaxHeadDim];
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const int64_t at = (t * shape.kv_heads + h) * dim;
      normalise(k + at, k_norm, key);
      kernels_.rope(key, c, s, half);
      kernels_.store_key(keys, h, position + t, key);
      kernels_.store_value(values, h, position + t, v + at);
    }
  };
  // The positions of a block of the cache share its lines: one task writes them all.
  const int64_t before = position % kCachePositions;
  pool_.parallel_for(shape.tokens > 0 ? tasks_of(before + shape.tokens, kCachePositions) : 0,
                     [&](int64_t task) {
                       const int64_t first = task * kCachePositions - before;
                       const int64_t end = std::min(first + kCachePositions, shape.tokens);
                       for (int64_t t = std::max<int64_t>(first, 0); t < end; ++t) prepare(t);
                     });
}

void FloatOps::attention(const AttentionShape& shape, const float* q, const CacheView& keys,
                         const CacheView& values, int64_t position, const float* q_gate, float* out,
                         const float* sinks) {
  const Attention call{kernels_, shape, q, keys, values, position, q_gate, sinks, out};
  const int64_t tokens = shape.tokens, lanes = call.lanes(), units = tokens * lanes;
  if (tokens == 0) return;
  const int64_t blocks = call.blocks(tokens - 1) - call.first_block(0);
  const int64_t wanted = kTasksPerThread * pool_.threads();
  // How the work is cut changes no bit: parts are added in the order of their keys either way.
  if (blocks == 1 || units >= wanted) {
    const int64_t step = std::clamp<int64_t>(units / wanted, 1, kTokensPerTask),
                  chunks = tasks_of(tokens, step);
    // The last tokens see the most keys: longest tasks first.
    pool_.parallel_for(chunks * lanes, [&](int64_t task) {
      const int64_t first = (chunks - 1 - task / lanes) * step;
      run_tokens(call, task % lanes, first, std::min(first + step, tokens));
    });
    return;
  }
  // One token after another: the parts of one are 8 MiB at 131,072 keys of the 35B shape.
  for (int64_t t = 0; t < tokens; ++t) run_keys(pool_, scratch_, call, t);
}

}  // namespace flashmoe
