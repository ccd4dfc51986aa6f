// The formulas of row_ops.py in one pass each, for the CPU: plain C++ without libraries, made by row_kernels.py on the machine it runs on.
// Types: float, or bfloat16 as its 16 bits; arithmetic is float32. Strides are between rows, in elements. See row_ops.py for the formulas.
#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" __attribute__((simd("notinbranch"))) float expf(float) noexcept;  // glibc's libmvec: 16 at a time

namespace {

typedef uint16_t bf16;

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to = bf16(x != x ? 0x7fc0 : rounded);
}

template <class T> float inverse_rms(const T* x, int64_t n, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += get(x[i]) * get(x[i]);
    return 1.0f / std::sqrt(sum / float(n) + eps);
}

template <class T>
void rms_norm(const T* x, int64_t xs, const float* w, float eps, T* out, int64_t os, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += xs, out += os) {
        float inverse = inverse_rms(x, n, eps);
        for (int64_t i = 0; i < n; i++) put(out[i], get(x[i]) * inverse * w[i]);
    }
}

// d_i w_i / rms - x_i (sum_j x_j d_j w_j) / (n rms^3)
template <class T, class D, class Put>
void norm_gradient(const T* x, const float* w, float eps, const D* d, int64_t n, Put result) {
    float inverse = inverse_rms(x, n, eps), along = 0;
    for (int64_t i = 0; i < n; i++) along += get(x[i]) * get(d[i]) * w[i];
    along *= inverse * inverse * inverse / float(n);
    for (int64_t i = 0; i < n; i++) result(i, get(d[i]) * w[i] * inverse - get(x[i]) * along);
}

template <class T>
void rms_norm_backward(const T* x, int64_t xs, const float* w, float eps, const T* d, int64_t ds, T* add, int64_t as, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += xs, d += ds, add += as)
        norm_gradient(x, w, eps, d, n, [add](int64_t i, float value) { put(add[i], get(add[i]) + value); });
}

const int64_t MOST = 1024;  // head_dim

template <class T>
void position_heads(const T* x, int64_t xs, const float* w, float eps, const float* cos, int64_t cs, const float* sin, int64_t ss, T* out, int64_t os,
                    int64_t rows, int64_t heads, int64_t dim) {
    float normed[MOST];
    int64_t half = dim / 2;
    for (int64_t r = 0; r < rows; r++, x += xs, out += os, cos += cs, sin += ss)
        for (int64_t h = 0; h < heads; h++) {
            const T* from = x + h * dim;
            T* to = out + h * dim;
            if (w) {
                float inverse = inverse_rms(from, dim, eps);
                for (int64_t i = 0; i < dim; i++) normed[i] = get(from[i]) * inverse * w[h * dim + i];
            } else
                for (int64_t i = 0; i < dim; i++) normed[i] = get(from[i]);
            for (int64_t i = 0; i < half; i++) {
                put(to[i], normed[i] * cos[i] - normed[i + half] * sin[i]);
                put(to[i + half], normed[i + half] * cos[i] + normed[i] * sin[i]);
            }
        }
}

template <class T>
void position_heads_backward(const T* x, int64_t xs, const float* w, float eps, const float* cos, int64_t cs, const float* sin, int64_t ss, const T* d,
                             int64_t ds, T* dx, int64_t dxs, int64_t rows, int64_t heads, int64_t dim) {
    float back[MOST];
    int64_t half = dim / 2;
    for (int64_t r = 0; r < rows; r++, x += xs, d += ds, dx += dxs, cos += cs, sin += ss)
        for (int64_t h = 0; h < heads; h++) {
            const T* from = d + h * dim;
            T* to = dx + h * dim;
            for (int64_t i = 0; i < half; i++) {
                back[i] = get(from[i]) * cos[i] + get(from[i + half]) * sin[i];
                back[i + half] = get(from[i + half]) * cos[i] - get(from[i]) * sin[i];
            }
            if (w)
                norm_gradient(x + h * dim, w + h * dim, eps, back, dim, [to](int64_t i, float value) { put(to[i], value); });
            else
                for (int64_t i = 0; i < dim; i++) put(to[i], back[i]);
        }
}

template <class T> void swiglu(const T* gate_up, int64_t gs, T* out, int64_t os, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, gate_up += gs, out += os)
        for (int64_t i = 0; i < n; i++) {
            float gate = get(gate_up[i]);
            put(out[i], gate / (1.0f + expf(-gate)) * get(gate_up[n + i]));
        }
}

template <class T>
void swiglu_backward(T* gate_up, int64_t gs, const T* d_act, int64_t ds, T* act, int64_t as, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, gate_up += gs, d_act += ds, act += as) {
        T* up_row = gate_up + n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) {
            float gate = get(gate_up[i]), up = get(up_row[i]), d = get(d_act[i]);
            float sigmoid = 1.0f / (1.0f + expf(-gate)), silu = gate * sigmoid;
            put(act[i], silu * up);
            put(gate_up[i], d * up * (sigmoid + silu * (1.0f - sigmoid)));
            put(up_row[i], d * silu);
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                                                      \
    void rms_norm_##NAME(const T* x, int64_t xs, const float* w, float eps, T* out, int64_t os, int64_t rows, int64_t n) {                     \
        rms_norm(x, xs, w, eps, out, os, rows, n);                                                                                             \
    }                                                                                                                                          \
    void rms_norm_backward_##NAME(const T* x, int64_t xs, const float* w, float eps, const T* d, int64_t ds, T* add, int64_t as, int64_t rows, \
                                  int64_t n) {                                                                                                 \
        rms_norm_backward(x, xs, w, eps, d, ds, add, as, rows, n);                                                                             \
    }                                                                                                                                          \
    void position_heads_##NAME(const T* x, int64_t xs, const float* w, float eps, const float* cos, int64_t cs, const float* sin, int64_t ss, T* out,      \
                               int64_t os, int64_t rows, int64_t heads, int64_t dim) {                                                         \
        position_heads(x, xs, w, eps, cos, cs, sin, ss, out, os, rows, heads, dim);                                                                \
    }                                                                                                                                          \
    void position_heads_backward_##NAME(const T* x, int64_t xs, const float* w, float eps, const float* cos, int64_t cs, const float* sin, int64_t ss,     \
                                        const T* d, int64_t ds, T* dx, int64_t dxs, int64_t rows, int64_t heads, int64_t dim) {                \
        position_heads_backward(x, xs, w, eps, cos, cs, sin, ss, d, ds, dx, dxs, rows, heads, dim);                                                \
    }                                                                                                                                          \
    void swiglu_##NAME(const T* gate_up, int64_t gs, T* out, int64_t os, int64_t rows, int64_t n) { swiglu(gate_up, gs, out, os, rows, n); }   \
    void swiglu_backward_##NAME(T* gate_up, int64_t gs, const T* d, int64_t ds, T* act, int64_t as, int64_t rows, int64_t n) {                 \
        swiglu_backward(gate_up, gs, d, ds, act, as, rows, n);                                                                                 \
    }

extern "C" {
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
}
