// Multi-head latent attention split over the pool: by tokens and heads, by spans of keys where those are few.
#include <algorithm>
#include <cstring>

#include "flashmoe/float_ops.h"
#include "flashmoe/work_split.h"

namespace flashmoe {
namespace {

constexpr int64_t kTasksPerThread = 4;

// One call's work: a unit is one token and up to kLatentHeads of its heads.
struct LatentAttention {
  const FloatKernels& kernels;
  LatentShape shape;
  const float* q;
  CacheView cache;
  int64_t position;
  float scale;
  float* out;

  int64_t lanes() const { return tasks_of(shape.heads, kLatentHeads); }
  int64_t spans(int64_t token) const { return tasks_of(position + token + 1, kLatentSpan); }
  int64_t heads(int64_t lane) const { return std::min(kLatentHeads, shape.heads - lane * kLatentHeads); }

  LatentTask task(int64_t token, int64_t lane, int64_t span) const {
    LatentTask task;
    task.q = q + (token * shape.heads + lane * kLatentHeads) * shape.width();
    task.latents = cache;
    task.heads = heads(lane);
    task.rank = shape.rank;
    task.first = span * kLatentSpan;
    task.count = std::min(kLatentSpan, position + token + 1 - task.first);
    task.scale = scale;
    return task;
  }

  void finish(int64_t token, int64_t lane, const LatentPart& total) const {
    kernels.finish_latents(total, heads(lane), shape.rank,
                           out + (token * shape.heads + lane * kLatentHeads) * shape.rank);
  }
};

// The spans of one unit one after another, added in their order.
void run_unit(const LatentAttention& call, int64_t token, int64_t lane) {
  alignas(64) float first[LatentPart::floats(kMaxLatent)], next[LatentPart::floats(kMaxLatent)];
  const LatentPart total = LatentPart::at(first), part = LatentPart::at(next);
  call.kernels.attend_latents(call.task(token, lane, 0), total);
  for (int64_t span = 1; span < call.spans(token); ++span) {
    call.kernels.attend_latents(call.task(token, lane, span), part);
    call.kernels.merge_latents(total, part, call.shape.rank);
  }
  call.finish(token, lane, total);
}

// The spans of one token side by side, then added in the same order.
void run_spans(ThreadPool& pool, GrowOnly<float>& scratch, const LatentAttention& call, int64_t token) {
  const int64_t lanes = call.lanes(), spans = call.spans(token);
  const int64_t size = LatentPart::floats(call.shape.rank);
  float* parts = scratch.at_least(lanes * spans * size);
  pool.parallel_for(lanes * spans, [&](int64_t task) {
    const LatentPart part = LatentPart::at(parts + task * size);
    call.kernels.attend_latents(call.task(token, task / spans, task % spans), part);
  });
  pool.parallel_for(lanes, [&](int64_t lane) {
    const LatentPart total = LatentPart::at(parts + lane * spans * size);
    for (int64_t span = 1; span < spans; ++span) {
      const LatentPart part = LatentPart::at(parts + (lane * spans + span) * size);
      call.kernels.merge_latents(total, part, call.shape.rank);
    }
    call.finish(token, lane, total);
  });
}

// x [2 * half] with its pairs brought from (2i, 2i + 1) to (i, i + half).
void unweave(const float* x, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[2 * i];
    out[half + i] = x[2 * i + 1];
  }
}

}  // namespace

void FloatOps::mla_prepare(const LatentShape& shape, const float* q, const float* latents, const float* norm,
                           float eps, const float* cos, const float* sin, bool interleaved, int64_t position,
                           float* q_out, const CacheView& cache) {
  const int64_t half = shape.rotated / 2, width = shape.width(), q_width = shape.nope + shape.rotated;
  const auto rotate = [&](const float* x, int64_t t, float* to) {
    if (interleaved) {
      unweave(x, half, to);
    } else {
      std::copy_n(x, 2 * half, to);
    }
    kernels_.rope(to, cos + (position + t) * half, sin + (position + t) * half, half);
  };
  const auto prepare = [&](int64_t t) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const int64_t head = t * shape.heads + h;
      rotate(q + head * q_width + shape.nope, t, q_out + head * width + shape.rank);
    }
    float row[kMaxLatent];
    kernels_.rms_norm(latents + t * width, norm, shape.rank, eps, row);
    rotate(latents + t * width + shape.rank, t, row + shape.rank);
    kernels_.store_value(cache, 0, position + t, row);
  };
  // Positions of one block of an int8 cache share the lines of its scales: one task writes them all.
  const int64_t before = position % kCachePositions;
  const int64_t tasks = shape.tokens > 0 ? tasks_of(before + shape.tokens, kCachePositions) : 0;
  pool_.parallel_for(tasks, [&](int64_t task) {
    const int64_t first = task * kCachePositions - before;
    const int64_t end = std::min(first + kCachePositions, shape.tokens);
    for (int64_t t = std::max<int64_t>(first, 0); t < end; ++t) prepare(t);
  });
}

void FloatOps::mla_attention(const LatentShape& shape, const float* q, const CacheView& cache,
                             int64_t position, float scale, float* out) {
  const LatentAttention call{kernels_, shape, q, cache, position, scale, out};
  const int64_t tokens = shape.tokens, lanes = call.lanes(), units = tokens * lanes;
  if (tokens == 0) return;
  // How the work is cut changes no bit: spans are added in the order of their keys either way.
  if (call.spans(tokens - 1) == 1 || units >= kTasksPerThread * pool_.threads()) {
    // The last tokens see the most keys: longest tasks first.
    pool_.parallel_for(units, [&](int64_t task) { run_unit(call, tokens - 1 - task / lanes, task % lanes); });
    return;
  }
  for (int64_t t = 0; t < tokens; ++t) run_spans(pool_, scratch_, call, t);
}

}  // namespace flashmoe
