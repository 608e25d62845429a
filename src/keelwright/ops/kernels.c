/* SPDX-License-Identifier: Apache-2.0 */
/* The inner loops of weight arithmetic, each the twin of a torch function in `ops`, with the same bits.

   Every value is an IEEE float32 and every operation is rounded by itself (the build switches contraction to fused
   multiply-add off), so the twins agree. Sums over a whole run (`kw_gram`) are the exception: they are accumulated in
   float64 in another order than torch's. `ops/kernels.py` calls these functions and documents them. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#define NOT_FINITE(bits) (((bits) & 0x7f800000u) == 0x7f800000u)

/* bfloat16 -> float32; returns 1 when a value is NaN or infinite. */
WIDE int kw_widen_bf16(const uint16_t *restrict source, int64_t n, float *restrict out) {
    uint32_t bad = 0;
    uint32_t *restrict bits = (uint32_t *)out;
    for (int64_t i = 0; i < n; i++) {
        uint32_t one = (uint32_t)source[i] << 16;
        bits[i] = one;
        bad |= NOT_FINITE(one);
    }
    return bad != 0;
}

/* Tell whether a float32 run holds NaN or infinity. */
WIDE int kw_any_nonfinite(const uint32_t *restrict bits, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= NOT_FINITE(bits[i]);
    return bad != 0;
}

/* float32 -> bfloat16, to nearest even; returns 1 when an output is NaN or infinite. */
WIDE int kw_narrow_bf16(const uint32_t *restrict bits, int64_t n, uint16_t *restrict out) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t one = bits[i];
        bad |= NOT_FINITE(one);
        one += 0x7fffu + ((one >> 16) & 1u);
        bad |= NOT_FINITE(one);
        out[i] = (uint16_t)(one >> 16);
    }
    return bad != 0;
}

/* out = sum_i w_i x_i, in the order of i; with `keep_equal`, entries on which all x agree are taken over. */
WIDE static void two_terms(const float *restrict a, const float *restrict b, float wa, float wb, int64_t n,
                           int keep_equal, float *restrict out) {
    if (keep_equal)
        for (int64_t i = 0; i < n; i++) {
            float sum = a[i] * wa + b[i] * wb;
            out[i] = a[i] == b[i] ? b[i] : sum;
        }
    else
        for (int64_t i = 0; i < n; i++) out[i] = a[i] * wa + b[i] * wb;
}

WIDE static void one_more(const float *restrict x, float w, int64_t n, float *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] = out[i] + x[i] * w;
}

#define BLOCK 4096

WIDE static void take_equal(int32_t k, const float *const *x, int64_t n, float *restrict out) {
    const float *restrict last = x[k - 1];
    int32_t same[BLOCK];
    for (int64_t i = 0; i < n; i++) same[i] = 1;
    for (int32_t j = 0; j < k - 1; j++) {
        const float *restrict other = x[j];
        for (int64_t i = 0; i < n; i++) same[i] &= other[i] == last[i];
    }
    for (int64_t i = 0; i < n; i++) out[i] = same[i] ? last[i] : out[i];
}

WIDE void kw_weighted_sum(int32_t k, const float *const *x, const float *w, int64_t n, int keep_equal, float *out) {
    const float *part[64];
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t size = n - start < BLOCK ? n - start : BLOCK;
        for (int32_t j = 0; j < k; j++) part[j] = x[j] + start;
        if (k == 1) {
            for (int64_t i = 0; i < size; i++) out[start + i] = part[0][i] * w[0];
            if (keep_equal) memcpy(out + start, part[0], (size_t)size * 4);
            continue;
        }
        two_terms(part[0], part[1], w[0], w[1], size, keep_equal && k == 2, out + start);
        for (int32_t j = 2; j < k; j++) one_more(part[j], w[j], size, out + start);
        if (keep_equal && k > 2) take_equal(k, part, size, out + start);
    }
}

/* Dot products of all pairs of (x_i - base), accumulated in float64; `out` is k x k and is added to. */
WIDE static double dot(const float *restrict a, const float *restrict b, int64_t n) {
    double lanes[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += (double)a[i + j] * (double)b[i + j];
    for (int j = 0; i < n; i++, j++) lanes[j] += (double)a[i] * (double)b[i];
    double sum = 0;
    for (int j = 0; j < 16; j++) sum += lanes[j];
    return sum;
}

WIDE void kw_gram(int32_t k, const float *const *x, const float *base, int64_t n, double *out) {
    static _Thread_local float deltas[64][1024];
    for (int64_t start = 0; start < n; start += 1024) {
        int64_t size = n - start < 1024 ? n - start : 1024;
        const float *part[64];
        for (int32_t j = 0; j < k; j++) {
            part[j] = x[j] + start;
            if (base) {
                for (int64_t i = 0; i < size; i++) deltas[j][i] = x[j][start + i] - base[start + i];
                part[j] = deltas[j];
            }
        }
        for (int32_t i = 0; i < k; i++)
            for (int32_t j = i; j < k; j++) {
                double one = dot(part[i], part[j], size);
                out[i * k + j] += one;
                if (i != j) out[j * k + i] += one;
            }
    }
}

/* Count magnitudes. Level 0: 65536 bins of the high 16 of the 31 magnitude bits. Level 1: 32768 bins of the low 15 bits
   of those values whose high bits are `prefix`. `bins` is added to. */
void kw_histogram(const uint32_t *bits, int64_t n, int32_t level, uint32_t prefix, int64_t *bins) {
    if (level == 0)
        for (int64_t i = 0; i < n; i++) bins[(bits[i] & 0x7fffffffu) >> 15]++;
    else
        for (int64_t i = 0; i < n; i++) {
            uint32_t one = bits[i] & 0x7fffffffu;
            if (one >> 15 == prefix) bins[one & 0x7fffu]++;
        }
}

/* Keep the values of magnitude bits in (low, high), and of those equal to `low` or `high` the ones whose flat index is
   below `low_until` or `high_until`; scale what is kept, zero the rest. */
WIDE void kw_keep_between(const uint32_t *restrict bits, int64_t n, int64_t offset, uint32_t low, int64_t low_until,
                          uint32_t high, int64_t high_from, float scale, float *restrict out) {
    int64_t low_count = low_until - offset, high_start = high_from - offset;
    for (int64_t i = 0; i < n; i++) {
        uint32_t one = bits[i] & 0x7fffffffu;
        int keep = ((one > low) | ((one == low) & (i < low_count))) & ((one < high) | ((one == high) & (i >= high_start)));
        out[i] = keep ? float_of(bits[i]) * scale : 0.0f;
    }
}

/* Philox4x32-10 (Salmon et al. 2011): words 4c .. 4c+3 come from counter (c low, c high, 0, 0). */
#define LANES 16
WIDE static void philox_block(uint32_t key0, uint32_t key1, uint64_t counter, uint32_t *restrict out) {
    /* Words in 64-bit lanes: the product of two 32-bit numbers is then one vector instruction. */
    uint64_t a[LANES], b[LANES], c[LANES], d[LANES];
    for (int i = 0; i < LANES; i++) {
        uint64_t one = counter + (uint64_t)i;
        a[i] = one & 0xffffffffu;
        b[i] = one >> 32;
        c[i] = d[i] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < LANES; i++) {
            uint64_t first = (a[i] & 0xffffffffu) * 0xD2511F53u, second = (c[i] & 0xffffffffu) * 0xCD9E8D57u;
            a[i] = (second >> 32) ^ b[i] ^ key0;
            c[i] = (first >> 32) ^ d[i] ^ key1;
            b[i] = second & 0xffffffffu;
            d[i] = first & 0xffffffffu;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    for (int i = 0; i < LANES; i++) {
        out[4 * i] = (uint32_t)a[i];
        out[4 * i + 1] = (uint32_t)b[i];
        out[4 * i + 2] = (uint32_t)c[i];
        out[4 * i + 3] = (uint32_t)d[i];
    }
}

void kw_philox(uint32_t key0, uint32_t key1, uint64_t first, int64_t n, uint32_t *out) {
    uint32_t words[4 * LANES];
    uint64_t position = first & ~(uint64_t)3;
    int64_t done = 0;
    while (done < n) {
        uint64_t skip = first + (uint64_t)done - position;
        int64_t size = (int64_t)(4 * LANES - skip);
        if (size > n - done) size = n - done;
        if (skip == 0 && size == 4 * LANES) {
            philox_block(key0, key1, position / 4, out + done);
        } else {
            philox_block(key0, key1, position / 4, words);
            memcpy(out + done, words + skip, (size_t)size * 4);
        }
        done += size;
        position += 4 * LANES;
    }
}

/* Keep x_i where word_i < threshold (all of them when threshold is 2^32), scaled; zero the rest. */
WIDE void kw_keep_below(const float *restrict x, const uint32_t *restrict words, int64_t n, uint64_t threshold,
                        float scale, float *restrict out) {
    if (threshold >= 0x100000000ull) {
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale;
        return;
    }
    uint32_t limit = (uint32_t)threshold;
    for (int64_t i = 0; i < n; i++) out[i] = words[i] < limit ? x[i] * scale : 0.0f;
}

/* Sum the weighted vectors v_i. elect 0: all; 1: those that agree with the sign of sum v (0 counts as plus); 2: with the
   sign of sum sign(v). `normalize` divides by the sum of the weights that took part (0 counts as 1). */
#define RUN 1024
WIDE static void add_agreeing(const float *restrict v, float weight, int64_t n, const float *restrict mass,
                              float *restrict sum, float *restrict share) {
    for (int64_t i = 0; i < n; i++) {
        /* mass >= 0 elects plus: v agrees when it is positive; else when it is negative. A zero never agrees. */
        float signed_value = mass[i] >= 0.0f ? v[i] : -v[i];
        sum[i] += signed_value > 0.0f ? v[i] : 0.0f;
        share[i] += signed_value > 0.0f ? weight : 0.0f;
    }
}

WIDE static void add_signs(const float *restrict v, int64_t n, float *restrict mass) {
    for (int64_t i = 0; i < n; i++) mass[i] += v[i] > 0.0f ? 1.0f : v[i] < 0.0f ? -1.0f : 0.0f;
}

WIDE static void add(const float *restrict v, int64_t n, float *restrict sum) {
    for (int64_t i = 0; i < n; i++) sum[i] += v[i];
}

WIDE static void divide(const float *restrict sum, const float *restrict share, int64_t n, float *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] = sum[i] / (share[i] == 0.0f ? 1.0f : share[i]);
}

void kw_elect(int32_t k, const float *const *v, const float *w, int64_t n, int elect, int normalize, float *out) {
    float total = 0;
    for (int32_t j = 0; j < k; j++) total += w[j];
    if (total < 1e-8f && total > -1e-8f) total = 1.0f;
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t size = n - start < RUN ? n - start : RUN;
        float mass[RUN], sum[RUN], share[RUN];
        for (int i = 0; i < RUN; i++) mass[i] = sum[i] = share[i] = 0.0f;
        if (elect == 0) {
            for (int32_t j = 0; j < k; j++) add(v[j] + start, size, sum);
            for (int i = 0; i < RUN; i++) share[i] = total;
        } else {
            for (int32_t j = 0; j < k; j++)
                if (elect == 1)
                    add(v[j] + start, size, mass);
                else
                    add_signs(v[j] + start, size, mass);
            for (int32_t j = 0; j < k; j++) add_agreeing(v[j] + start, w[j], size, mass, sum, share);
        }
        if (normalize)
            divide(sum, share, size, out + start);
        else
            memcpy(out + start, sum, (size_t)size * 4);
    }
}

int kw_version(void) { return 1; }
