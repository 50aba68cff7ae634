// One parameter struct an operation, written once.
//
// Each struct is an X-macro list of fields. The list declares the struct for C++ and yields its field table (name,
// offset) for Python, which packs a Problem by name from that table: there is no second list to keep in step.
// Every field is an int64_t: sizes and strides may pass 2^31, and one type keeps the packing trivial.
// Strides count elements, never bytes. The channel stride of an activation is 1 (NHWC is the layout of kernels;
// one that takes any says so where it is registered); the pixel strides are free, so that a result can be written into
// a slice of a larger tensor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cnnfast {

struct Field {
  const char* name;
  int64_t offset;
};

struct StructInfo {
  const char* name;
  int64_t size;
  const Field* fields;
  int64_t count;
};

#define CNNFAST_DECLARE_FIELD(name) int64_t name;
#define CNNFAST_FIELD_ENTRY(name) {#name, static_cast<int64_t>(offsetof(Self, name))},

#define CNNFAST_PARAMS(Name, LIST)                                                                            \
  struct Name {                                                                                               \
    LIST(CNNFAST_DECLARE_FIELD)                                                                               \
  };                                                                                                          \
  namespace detail_##Name {                                                                                   \
    using Self = Name;                                                                                        \
    inline constexpr Field fields[] = {LIST(CNNFAST_FIELD_ENTRY)};                                            \
  }                                                                                                           \
  inline constexpr StructInfo Name##Info = {#Name, static_cast<int64_t>(sizeof(Name)), detail_##Name::fields, \
                                            static_cast<int64_t>(sizeof(detail_##Name::fields) / sizeof(Field))};

// y[n,k,p,q] = b[k] + sum_{c,r,s} x[n, g*C/G + c, h, w] * w[k,c,r,s]
//              h = p*stride_h - pad_h + r*dilation_h, w = q*stride_w - pad_w + s*dilation_w
// C and K are the totals over the G groups. pad_h and pad_w are the paddings above and to the left; what is padded
// below and to the right follows from H, W, P, Q. One struct serves every direction: fprop writes y, dgrad x, wgrad w,
// bgrad b; the strides always describe the tensor of that name (for dgrad x_* are dx's, for wgrad w_* are dw's).
// Operands, in order: x, w, b, y; those a direction doesn't use, and an absent bias, are null. x_c and y_c are 1 for
// every kernel but those that ask for operands in any layout.
// fprop also serves conv_bn_act, with three more operands, each of which may be null: scale and shift (vectors
// of K in the type that sums have: double for f64, else float) and the residual r:
//   y = act(scale[k] * (what conv2d gives) + shift[k] + r[n,k,p,q]),     act: an Activation (activation.h)
// conv2d itself is the same kernel with these null and act and r_* 0.
// clang-format off
#define CNNFAST_CONV2D_FIELDS(F)                                                        \
  F(N) F(C) F(H) F(W) F(K) F(R) F(S) F(P) F(Q) F(G)                                     \
  F(stride_h) F(stride_w) F(pad_h) F(pad_w) F(dilation_h) F(dilation_w)                 \
  F(x_n) F(x_c) F(x_h) F(x_w) F(w_k) F(w_c) F(w_r) F(w_s) F(y_n) F(y_c) F(y_h) F(y_w)  \
  F(act) F(r_n) F(r_c) F(r_h) F(r_w)
// clang-format on
CNNFAST_PARAMS(Conv2dParams, CNNFAST_CONV2D_FIELDS)

// y[n,c,p,q] = max_{r,s} x[n,c,h,w]
//              h = p*stride_h - pad_h + r*dilation_h, w = q*stride_w - pad_w + s*dilation_w
// Taps outside the image are left out, -inf where none is left. The first of equal elements is the maximum; in a window
// with NaNs the last NaN is. Operands, in order: x (values), y (result or its gradient), i (int64 offsets h*W + w of
// the maxima), t (a gradient or tangent of x), k (a byte: which tap of its window is the maximum, r*S + s; 255 where
// the window has none in the image). Directions: fprop x -> y; indices x -> y, i; dgrad x, y -> t; jvp x, t -> y; taps
// x -> y, k; scatter y, k -> t, which is dgrad without a search.
// clang-format off
#define CNNFAST_MAX_POOL2D_FIELDS(F)                                                    \
  F(N) F(C) F(H) F(W) F(R) F(S) F(P) F(Q)                                               \
  F(stride_h) F(stride_w) F(pad_h) F(pad_w) F(dilation_h) F(dilation_w)                 \
  F(x_n) F(x_h) F(x_w) F(y_n) F(y_h) F(y_w) F(i_n) F(i_h) F(i_w) F(t_n) F(t_h) F(t_w)   \
  F(k_n) F(k_h) F(k_w)
// clang-format on
CNNFAST_PARAMS(MaxPool2dParams, CNNFAST_MAX_POOL2D_FIELDS)

// y[n,c,p,q] = sum_{h,w} x[n,c,h,w] / divisor       h = p*stride_h - pad_h + r, w = q*stride_w - pad_w + s, inside the
// image. The divisor is divisor_override where that isn't 0; else the number of the window's taps inside the image and,
// with count_include_pad, in its padding. Operands, in order: x, y. Directions: fprop writes y, dgrad x, from y's
// gradient; the strides describe the tensor of that name.
// clang-format off
#define CNNFAST_AVG_POOL2D_FIELDS(F)                                                    \
  F(N) F(C) F(H) F(W) F(R) F(S) F(P) F(Q)                                               \
  F(stride_h) F(stride_w) F(pad_h) F(pad_w) F(count_include_pad) F(divisor_override)    \
  F(x_n) F(x_h) F(x_w) F(y_n) F(y_h) F(y_w)
// clang-format on
CNNFAST_PARAMS(AvgPool2dParams, CNNFAST_AVG_POOL2D_FIELDS)

// y[n,c,p,q] = the mean of x[n,c,h,w] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
// Operands and directions as of avg_pool2d.
// clang-format off
#define CNNFAST_ADAPTIVE_AVG_POOL2D_FIELDS(F)                                           \
  F(N) F(C) F(H) F(W) F(P) F(Q)                                                         \
  F(x_n) F(x_h) F(x_w) F(y_n) F(y_h) F(y_w)
// clang-format on
CNNFAST_PARAMS(AdaptiveAvgPool2dParams, CNNFAST_ADAPTIVE_AVG_POOL2D_FIELDS)

// y[n,c,p,q] = the maximum of x[n,c,h,w] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
// Everything else as of max_pool2d; s counts to the columns of the widest window.
// clang-format off
#define CNNFAST_ADAPTIVE_MAX_POOL2D_FIELDS(F)                                           \
  F(N) F(C) F(H) F(W) F(P) F(Q)                                                         \
  F(x_n) F(x_h) F(x_w) F(y_n) F(y_h) F(y_w) F(i_n) F(i_h) F(i_w) F(t_n) F(t_h) F(t_w)   \
  F(k_n) F(k_h) F(k_w)
// clang-format on
CNNFAST_PARAMS(AdaptiveMaxPool2dParams, CNNFAST_ADAPTIVE_MAX_POOL2D_FIELDS)

// Batch norm over N, H, W of every channel, with a residual and an activation:
//   stats           m[c] = mean of x, v[c] = 1 / sqrt(mean of (x - m)^2 + eps), s[c] = sum of (x - m)^2 / (N*H*W - 1)
//   fprop           y[n,c,h,w] = act((x - m[c]) * v[c] * w[c] + b[c] + r[n,c,h,w])
//   wgrad           dw[c] = sum of dz * (x - m) * v, db[c] = sum of dz,           dz = y * act'
//   dgrad           t = w * v * dz
//   backward        dw, db and t; in training t = w * v * (dz - (db + (x - m) * v * dw) / (N*H*W))
//   backward_residual  these, and u = dz
// Operands, in order: x, w, b, m, v, r, y, s, dw, db, t, u. w, b, m, v, r may be null (1, 0, 0, 1, 0). Vectors are
// of the type that sums have. Without training v is a variance, and 1 / sqrt(v + eps) is meant. In the gradient's
// directions y is the result's gradient, and r, where given, the result itself, which act' is then read from (else from
// what fprop computes). eps_bits are the bits of eps, a double; act is an Activation (activation.h).
// clang-format off
#define CNNFAST_BATCH_NORM_FIELDS(F)                                                    \
  F(N) F(C) F(H) F(W) F(act) F(training) F(eps_bits)                                    \
  F(x_n) F(x_h) F(x_w) F(r_n) F(r_h) F(r_w) F(y_n) F(y_h) F(y_w)                        \
  F(t_n) F(t_h) F(t_w) F(u_n) F(u_h) F(u_w)
// clang-format on
CNNFAST_PARAMS(BatchNormParams, CNNFAST_BATCH_NORM_FIELDS)

// y = what conv2d gives, and the statistics that batch_norm's direction stats gives of it as it is stored:
//   ym[k] = mean of y, yv[k] = 1 / sqrt(mean of (y - ym)^2 + eps), ys[k] = sum of (y - ym)^2 / (N*P*Q - 1)
// Operands, in order: x, w, b, y, xm, xv, xw, xb, ym, yv, ys, dw, db, t; of which fprop, the only direction here, has
// x, w, b (null: 0), y, ym, yv, ys. The struct is conv2d's and the bits of eps, a double.
// clang-format off
#define CNNFAST_BN_ACT_CONV_FIELDS(F) CNNFAST_CONV2D_FIELDS(F) F(eps_bits)
// clang-format on
CNNFAST_PARAMS(BnActConvParams, CNNFAST_BN_ACT_CONV_FIELDS)

// fprop y = act(x + r); dgrad t = g * act', which is read from the result y. Operands, in order: x, r, y, g, t.
// clang-format off
#define CNNFAST_ADD_ACT_FIELDS(F)                                                       \
  F(N) F(C) F(H) F(W) F(act)                                                            \
  F(x_n) F(x_c) F(x_h) F(x_w) F(r_n) F(r_c) F(r_h) F(r_w) F(y_n) F(y_c) F(y_h) F(y_w)   \
  F(g_n) F(g_c) F(g_h) F(g_w) F(t_n) F(t_c) F(t_h) F(t_w)
// clang-format on
CNNFAST_PARAMS(AddActParams, CNNFAST_ADD_ACT_FIELDS)

}  // namespace cnnfast
