// The D x D algebra between the two passes as separate kernels, for tokens that do not fit in shared memory.
#pragma once

#include "maps.h"
#include "weights.h"

namespace xk::cuda {

constexpr int kMapThreads = 256, kMapColumns = 32;  // kMapColumns: columns of a map per block

struct MapArgs {
  MapOptions options;
  PerHead temperature;
  int64_t batch, heads, parts;
  int32_t dim;
  const float* partial;  // (parts, batch, heads, step): Gram matrix; in forward, then sums of squares of k and of q
  int64_t step;
  float* stats;
  float *p, *q;         // (batch, heads, dim, dim); forward writes only p, the map
  float* scale_q;       // (batch, heads, dim); key_value: (pieces, batch, heads, dim), like scale_k
  float* scale_k;       // (pieces, batch, heads, dim): one piece from each block of columns
  float* dtemperature;  // (pieces, batch, heads)
};

// to[h] = sum over i of parts[i, h], in a fixed order: dtemperature, summed over pieces and batch.
struct TemperatureArgs {
  const float* parts;  // (count, heads)
  int64_t count, heads;
  PerHead to;
};

void launch_map_forward(const MapArgs& p, void* stream);
void launch_map_backward(const MapArgs& p, void* stream);
void launch_temperature(const TemperatureArgs& p, void* stream);

}  // namespace xk::cuda
