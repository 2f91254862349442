/* The passes over activations that PyTorch has no one operation for, on the CPU: thin products with the keyed dropout
 * of adapter/draws.py drawn on the fly, and DoRA's gain.  native/__init__.py compiles and calls this; adapter/draws.py,
 * lowrank/products.py and lowrank/magnitude.py hold the plain versions, which are the reference and the fallback.
 *
 * Legend: K member, N rows, F features, R rank slots.  Arrays are dense, the last axis contiguous; x is (K, N, F) in fp32
 * or bf16, all sums are fp32.  Element (n, f) of a member has the position (first + n) * pitch + f in its draw; pitch is F, or
 * more where only the first token of each sequence is computed; first is 0, or the rows that other processes have.  Work is divided over rows or over features so that no sum
 * crosses a thread: results do not depend on the number of threads.
 *
 * Included once for each element type by the lines at the end.
 */
#ifndef ELEMENT

#include <stdint.h>
#include <string.h>

typedef int64_t size;

typedef struct {
  const int32_t *keys; /* (K, 2), or NULL: nothing is dropped */
  int32_t threshold;   /* the least draw that survives */
  float scale;         /* what a survivor is multiplied with */
  size pitch;
  size first; /* rows of each member before these, which other processes have */
} Drop;

enum { CHUNK = 1024, BLOCK = 64 }; /* features at a time: a few rows of a chunk, or rank x block, stay in the first-level cache */

static inline uint32_t mixed(uint32_t bits) { /* MurmurHash3's finalizer */
  bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
  bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
  return bits ^ (bits >> 16);
}

static inline void factors(float *restrict out, const Drop *drop, size k, size row, size from, size count) {
  const uint32_t key = (uint32_t)drop->keys[2 * k], odd = (uint32_t)drop->keys[2 * k + 1] | 1u;
  const uint32_t start = (uint32_t)((drop->first + row) * drop->pitch + from), end = (uint32_t)count;
  const int32_t threshold = drop->threshold;
  uint32_t kept;
  memcpy(&kept, &drop->scale, sizeof kept);
  for (uint32_t f = 0; f < end; f++) { /* 0 or the scale, chosen as bits */
    const int32_t drawn = (int32_t)((mixed(start + f) ^ key) * odd);
    const uint32_t bits = drawn >= threshold ? kept : 0u;
    memcpy(out + f, &bits, sizeof bits);
  }
}

static inline float widened(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static inline uint16_t rounded(float value) { /* to the nearest bf16, ties to even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint16_t near = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : near;
}

#define JOIN(a, b) a##b
#define NAMED(name, suffix) JOIN(name, suffix)
#define ROUTINE(name) NAMED(name, SUFFIX)

#define ELEMENT float
#define SUFFIX _f32
#define LOAD(v) (v)
#define STORE(v) (v)
#include __FILE__
#undef ELEMENT
#undef SUFFIX
#undef LOAD
#undef STORE

#define ELEMENT uint16_t
#define SUFFIX _bf16
#define LOAD(v) widened(v)
#define STORE(v) rounded(v)
#include __FILE__

#else

/* A piece of a row in fp32, dropped. */
static inline void ROUTINE(piece)(float *out, const ELEMENT *x, const Drop *drop, size k, size row, size from, size count) {
  if (drop->keys) {
    float factor[CHUNK];
    factors(factor, drop, k, row, from, count);
    for (size f = 0; f < count; f++) out[f] = LOAD(x[f]) * factor[f];
  } else
    for (size f = 0; f < count; f++) out[f] = LOAD(x[f]);
}

/* y = drop(x) */
void ROUTINE(drop)(ELEMENT *y, const ELEMENT *x, const Drop *drop, size K, size N, size F, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * N; at++)
    for (size from = 0; from < F; from += CHUNK) {
      const size count = F - from < CHUNK ? F - from : CHUNK;
      float factor[CHUNK];
      factors(factor, drop, at / N, at % N, from, count);
      for (size f = 0; f < count; f++) y[at * F + from + f] = STORE(LOAD(x[at * F + from + f]) * factor[f]);
    }
}

/* z (K, N, R) = drop(x) M^T, M (K, R, F); with places, x's k-th has M's places[k]-th */
void ROUTINE(dots)(float *z, const ELEMENT *x, const float *M, const size *places, const Drop *drop, size K, size N, size F, size R,
                   int threads) {
  const size pairs = (N + 1) / 2; /* two rows at a time, four rows of M at a time: eight sums in registers */
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * pairs; at++) {
    const size k = at / pairs, n = at % pairs * 2, rows = N - n < 2 ? 1 : 2;
    const float *m = M + (places ? places[k] : k) * R * F;
    float *out = z + (k * N + n) * R;
    float a[CHUNK], b[CHUNK];
    for (size r = 0; r < rows * R; r++) out[r] = 0;
    for (size from = 0; from < F; from += CHUNK) {
      const size count = F - from < CHUNK ? F - from : CHUNK;
      ROUTINE(piece)(a, x + (k * N + n) * F + from, drop, k, n, from, count);
      if (rows == 2)
        ROUTINE(piece)(b, x + (k * N + n + 1) * F + from, drop, k, n + 1, from, count);
      else
        memset(b, 0, count * sizeof *b);
      size r = 0;
      for (; r + 4 <= R; r += 4) {
        const float *m0 = m + r * F + from, *m1 = m0 + F, *m2 = m1 + F, *m3 = m2 + F;
        float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
        for (size f = 0; f < count; f++) {
          a0 += a[f] * m0[f], a1 += a[f] * m1[f], a2 += a[f] * m2[f], a3 += a[f] * m3[f];
          b0 += b[f] * m0[f], b1 += b[f] * m1[f], b2 += b[f] * m2[f], b3 += b[f] * m3[f];
        }
        out[r] += a0, out[r + 1] += a1, out[r + 2] += a2, out[r + 3] += a3;
        if (rows == 2) out[R + r] += b0, out[R + r + 1] += b1, out[R + r + 2] += b2, out[R + r + 3] += b3;
      }
      for (; r < R; r++) {
        const float *m0 = m + r * F + from;
        float a0 = 0, b0 = 0;
        for (size f = 0; f < count; f++) a0 += a[f] * m0[f], b0 += b[f] * m0[f];
        out[r] += a0;
        if (rows == 2) out[R + r] += b0;
      }
    }
  }
}

/* y += z M, M (K, R, F); with places, y's k-th has M's places[k]-th; y may be its own start */
void ROUTINE(update)(ELEMENT *y, const float *z, const float *M, const size *places, size K, size N, size F, size R, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * N; at++) {
    const float *m = M + (places ? places[at / N] : at / N) * R * F, *c = z + at * R;
    float sum[CHUNK];
    for (size from = 0; from < F; from += CHUNK) {
      const size count = F - from < CHUNK ? F - from : CHUNK;
      ELEMENT *row = y + at * F + from;
      for (size f = 0; f < count; f++) sum[f] = LOAD(row[f]);
      size r = 0;
      for (; r + 4 <= R; r += 4) {
        const float *m0 = m + r * F + from, *m1 = m0 + F, *m2 = m1 + F, *m3 = m2 + F;
        const float c0 = c[r], c1 = c[r + 1], c2 = c[r + 2], c3 = c[r + 3];
        for (size f = 0; f < count; f++) sum[f] += c0 * m0[f] + c1 * m1[f] + c2 * m2[f] + c3 * m3[f];
      }
      for (; r < R; r++)
        for (size f = 0; f < count; f++) sum[f] += c[r] * m[r * F + from + f];
      for (size f = 0; f < count; f++) row[f] = STORE(sum[f]);
    }
  }
}

/* dM (K, R, F) = z^T drop(x), and, where dx is given, dx = drop's derivative of z M */
void ROUTINE(outer)(float *dM, ELEMENT *dx, const ELEMENT *x, const float *z, const float *M, const Drop *drop, size K, size N,
                    size F, size R, int threads) {
  const size blocks = (F + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * blocks; at++) {
    const size k = at / blocks, from = at % blocks * BLOCK, count = F - from < BLOCK ? F - from : BLOCK;
    float *out = dM + k * R * F + from;
    const float *m = M ? M + k * R * F + from : 0;
    float factor[4][BLOCK], piece[4][BLOCK], sum[BLOCK];
    for (size r = 0; r < R; r++) memset(out + r * F, 0, count * sizeof *out);
    for (size n = 0; n < N; n += 4) { /* four rows at a time: dM is read and written a quarter as often */
      const size rows = N - n < 4 ? N - n : 4;
      const float *c = z + (k * N + n) * R;
      for (size i = 0; i < 4; i++) {
        if (i >= rows) {
          memset(piece[i], 0, sizeof piece[i]);
          continue;
        }
        const ELEMENT *row = x + (k * N + n + i) * F + from;
        if (drop->keys) {
          factors(factor[i], drop, k, n + i, from, count);
          for (size f = 0; f < count; f++) piece[i][f] = LOAD(row[f]) * factor[i][f];
        } else
          for (size f = 0; f < count; f++) piece[i][f] = LOAD(row[f]);
      }
      for (size r = 0; r < R; r++) {
        const float c0 = c[r], c1 = rows > 1 ? c[R + r] : 0, c2 = rows > 2 ? c[2 * R + r] : 0, c3 = rows > 3 ? c[3 * R + r] : 0;
        float *to = out + r * F;
        for (size f = 0; f < count; f++) to[f] += c0 * piece[0][f] + c1 * piece[1][f] + c2 * piece[2][f] + c3 * piece[3][f];
      }
      for (size i = 0; dx && i < rows; i++) {
        const float *ci = c + i * R;
        ELEMENT *to = dx + (k * N + n + i) * F + from;
        memset(sum, 0, sizeof sum);
        size r = 0;
        for (; r + 4 <= R; r += 4) {
          const float *m0 = m + r * F, *m1 = m0 + F, *m2 = m1 + F, *m3 = m2 + F;
          for (size f = 0; f < count; f++) sum[f] += ci[r] * m0[f] + ci[r + 1] * m1[f] + ci[r + 2] * m2[f] + ci[r + 3] * m3[f];
        }
        for (; r < R; r++)
          for (size f = 0; f < count; f++) sum[f] += ci[r] * m[r * F + f];
        if (drop->keys)
          for (size f = 0; f < count; f++) to[f] = STORE(sum[f] * factor[i][f]);
        else
          for (size f = 0; f < count; f++) to[f] = STORE(sum[f]);
      }
    }
  }
}

/* y = (t - bias) * gain + bias; gain (K, F), bias (F,) or NULL */
void ROUTINE(scale_rows)(ELEMENT *y, const ELEMENT *t, const float *gain, const float *bias, size K, size N, size F, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * N; at++) {
    const float *factor = gain + at / N * F;
    const size start = at * F;
    if (bias)
      for (size f = 0; f < F; f++) y[start + f] = STORE((LOAD(t[start + f]) - bias[f]) * factor[f] + bias[f]);
    else
      for (size f = 0; f < F; f++) y[start + f] = STORE(LOAD(t[start + f]) * factor[f]);
  }
}

/* dt = g * gain and dgain (K, F) = sum over rows of (t - bias) * g; bias (F,) or NULL */
void ROUTINE(scale_rows_backward)(ELEMENT *dt, float *dgain, const ELEMENT *g, const ELEMENT *t, const float *gain, const float *bias, size K,
                     size N, size F, int threads) {
  const size blocks = (F + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size at = 0; at < K * blocks; at++) {
    const size k = at / blocks, from = at % blocks * BLOCK, count = F - from < BLOCK ? F - from : BLOCK;
    float sum[BLOCK] = {0}, shift[BLOCK] = {0};
    if (bias) memcpy(shift, bias + from, count * sizeof *shift);
    for (size n = 0; n < N; n++) {
      const size start = (k * N + n) * F + from;
      for (size f = 0; f < count; f++) {
        const float slope = LOAD(g[start + f]);
        sum[f] += (LOAD(t[start + f]) - shift[f]) * slope;
        dt[start + f] = STORE(slope * gain[k * F + from + f]);
      }
    }
    memcpy(dgain + k * F + from, sum, count * sizeof *sum);
  }
}

#endif
