// Compares every entry of every instruction set that this build and this processor have with the portable one.
// One line per entry; exit status 1 if any of them differs. Free of Python, so that it also runs cross-compiled.
//
// What two tables may differ by:
//   integers   nothing.
//   floats     nothing, on data of small integers and powers of two: no operation rounds, in whatever order and fused or
//              not. On realistic data a sum of n terms may differ by n * epsilon * sum |terms|: each side rounds a term
//              at most n times, by at most epsilon / 2. Functions that use exp may add 4 epsilon.
//   rows       a row alone equals, bit for bit, the same row among others; nothing outside the result is written.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../half.h"
#include "../isa.h"
#include "../pack.h"
#include "check.h"

using namespace miniphi;

namespace {

constexpr double kEpsilon = FLT_EPSILON;
const char* const kKindNames[kNumKinds] = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "NL4"};

struct Expected {
    std::vector<float> value;    // [1 + max rows][32]
    std::vector<double> bound;   // the same shape
};

using RowsFn = std::function<void(size_t first, int num_rows, float* y, size_t stride, bool add)>;

// Every number of rows up to the largest, stored and added, from row 1 on; each row alone.
void check_rows(Check& check, const RowsFn& run, int max_rows, const Expected& expected, const std::string& where) {
    constexpr size_t stride = kBlockColumns + 16;
    const std::vector<float> start = Random(7).integers(size_t(max_rows + 1) * stride, -9, 9);
    for (int rows = 1; rows <= max_rows; rows++) {
        for (const bool add : {false, true}) {
            const std::string here = where + ", " + std::to_string(rows) + " rows" + (add ? ", added" : "");
            std::vector<float> result = start;
            run(1, rows, result.data(), stride, add);
            std::vector<float> rest = result, alone = start;
            for (size_t i = 0; i < size_t(rows); i++) {
                for (size_t n = 0; n < kBlockColumns; n++) {
                    const size_t at = (1 + i) * kBlockColumns + n;
                    const float old = add ? start[i * stride + n] : 0, wanted = old + expected.value[at];
                    const double bound = expected.bound[at];
                    const double rounding = bound > 0 && add ? kEpsilon * (std::fabs(old) + std::fabs(wanted)) : 0;
                    check.close(result[i * stride + n], wanted, bound + rounding, here);
                    rest[i * stride + n] = start[i * stride + n];
                }
                run(1 + i, 1, alone.data() + i * stride, stride, add);
            }
            check.same(rest, start, here + ", outside the result");
            check.same(alone, result, here + ", each row alone");
        }
    }
}

enum class Data {
    Exact,     // small integers
    Extreme,   // codes and activations at the ends of their ranges: overflow of narrow accumulators shows
    Realistic,
};

std::string where_of(Data data, size_t depth) {
    const char* name = data == Data::Exact ? "exact" : data == Data::Extreme ? "extreme" : "realistic";
    return std::string(name) + ", K = " + std::to_string(depth);
}

std::vector<uint8_t> random_block(Kind kind, size_t depth, Data data, Random& random) {
    const Layout layout = layout_of(kind);
    std::vector<uint8_t> block(block_bytes(kind, depth));
    const auto put_halves = [&](uint8_t* p, float sign) {
        for (size_t n = 0; n < kBlockColumns; n++) {
            constexpr float exact[] = {1, -1, 2, -2};
            float value = sign * random.uniform(0, 0.01f);   // some of them are subnormal in half precision
            if (data != Data::Realistic) value = data == Data::Extreme ? 1 : exact[random.integer(0, 3)];
            const uint16_t half = to_f16_scalar(value);
            std::memcpy(p + 2 * n, &half, 2);
        }
    };
    uint8_t* p = block.data();
    const int extreme = random.integer(0, 1) * 255;
    for (size_t g = 0; g < depth / layout.group; g++) {
        if (layout.super_bytes && g % kSuperGroups == 0) {
            put_halves(p, 1);
            if (layout.scale == Scale::Super) put_halves(p + 64, -1);   // subtracted: no cancellation, see tile_bounds
            p += layout.super_bytes;
        }
        for (size_t i = 0; i < layout.group_bytes; i++) p[i] = uint8_t(data == Data::Extreme ? extreme : random.integer(0, 255));
        uint8_t* scales = p + layout.scale_offset();
        if (!layout.super_bytes) put_halves(scales, 1);
        if (layout.scale == Scale::Minimum) put_halves(scales + 64, 1);
        for (size_t i = 0; layout.super_bytes && i < 64; i++) {
            const int range = data == Data::Exact ? 15 : 255, low = layout.scale == Scale::SuperHalf ? -(range + 1) / 2 : 0;
            scales[i] = uint8_t(data == Data::Extreme ? 1 : low + random.integer(0, range));
        }
        p += layout.group_bytes;
    }
    return block;
}

struct Activations {
    std::vector<int8_t> q;
    std::vector<float> scale, scaled_sum;
    std::vector<int32_t> exponent, correction;
    QuantRows rows;
    // Of a group; what the row's scale and the exponent make of it.
    float scale_of(size_t row, size_t g) const {
        if (exponent.empty()) return scale[row * rows.groups + g];
        return std::ldexp(scale[row], exponent[row * rows.groups + g] >> kExponentShift);
    }
};

void fill_activations(Activations& a, Kind kind, size_t num_rows, size_t depth, Data data, Random& random) {
    const Layout layout = layout_of(kind);
    const size_t groups = depth / layout.group, stride = depth + 48, halves = layout.scale == Scale::SuperHalf ? 2 : 1;
    for (size_t i = 0; i < num_rows * stride; i++)
        a.q.push_back(int8_t(data == Data::Extreme ? (i / stride % 2 ? 127 : -127) : random.integer(-127, 127)));
    for (size_t row = 0; row < num_rows; row++) {
        for (size_t g = 0; g < groups; g++) {
            int32_t sum[2] = {};   // of the group's halves
            for (size_t i = 0; i < layout.group; i++) sum[2 * i / layout.group] += a.q[row * stride + g * layout.group + i];
            float scale = random.uniform(0.001f, 0.1f);
            if (data != Data::Realistic) scale = data == Data::Extreme ? 1 : float(random.integer(1, 2));
            if (!layout.is_wide() || g == 0) a.scale.push_back(scale);
            if (layout.is_wide()) a.exponent.push_back(random.integer(0, data == Data::Realistic ? kMaxExponent : 2) << kExponentShift);
            a.scaled_sum.push_back(scale * float(sum[0] + sum[1]));
            if (halves == 2) a.correction.insert(a.correction.end(), {-layout.zero * sum[0], -layout.zero * sum[1]});
            else a.correction.push_back(-layout.zero * (sum[0] + sum[1]));
        }
    }
    a.rows = {a.q.data(), a.scale.data(), a.exponent.data(), a.correction.data(), a.scaled_sum.data(),
              stride, layout.is_wide() ? 1 : groups, groups * halves, groups};
}

// The terms are dots times scales and minima times sums; both have the sign that adds up in sum |w x|.
std::vector<double> tile_bounds(Kind kind, const std::vector<uint8_t>& block, const Activations& a, size_t num_rows, size_t depth) {
    const double roundings = double(3 * a.rows.groups + 8);
    std::vector<double> bounds(num_rows * kBlockColumns);
    std::vector<float> w(depth);
    for (size_t n = 0; n < kBlockColumns; n++) {
        unpack_column(kind, block.data(), n, depth, w.data());
        for (size_t row = 0; row < num_rows; row++) {
            double sum = 0;
            for (size_t k = 0; k < depth; k++)
                sum += std::fabs(double(w[k]) * a.q[row * a.rows.q_stride + k]) * a.scale_of(row, k / layout_of(kind).group);
            bounds[row * kBlockColumns + n] = roundings * kEpsilon * sum;
        }
    }
    return bounds;
}

void check_tile(Check& check, const Ops& ops, Kind kind) {
    Random random{unsigned(kind)};
    for (const size_t depth : {32, 96, 256, 768}) {
        if ((layout_of(kind).super_bytes && depth % 256 != 0) || depth % layout_of(kind).group != 0) continue;
        for (const Data data : {Data::Exact, Data::Extreme, Data::Realistic}) {
            constexpr size_t num_rows = kMaxTileRows + 1;
            const std::vector<uint8_t> block = random_block(kind, depth, data, random);
            Activations a;
            fill_activations(a, kind, num_rows, depth, data, random);
            Expected expected{std::vector<float>(num_rows * kBlockColumns), std::vector<double>(num_rows * kBlockColumns)};
            ops_portable().tile[int(kind)](block.data(), {block.data(), 0x155}, a.rows, 0, num_rows, expected.value.data(), kBlockColumns, false);
            if (data == Data::Realistic) expected.bound = tile_bounds(kind, block, a, num_rows, depth);
            const auto run = [&](size_t first, int rows, float* y, size_t stride, bool add) {
                ops.tile[int(kind)](block.data(), {block.data(), 0x155}, a.rows, first, rows, y, stride, add);
            };
            check_rows(check, run, ops.tile_rows, expected, where_of(data, depth));
        }
    }
}

// A panel in its storage format; `values` becomes what is stored.
std::vector<uint8_t> encode_panel(const char* format, std::vector<float>& values) {
    const std::string name = format;
    std::vector<uint8_t> bytes;
    for (float& v : values) {
        uint32_t word = bits_of(v);
        size_t size = 4;
        if (name != "F32") {
            word = name == "F16" ? to_f16_scalar(v) : word >> 16;
            v = name == "F16" ? from_f16(uint16_t(word)) : from_bf16(uint16_t(word));
            size = 2;
        }
        for (size_t i = 0; i < size; i++) bytes.push_back(uint8_t(word >> (8 * i)));
    }
    return bytes;
}

void check_panel(Check& check, const char* format, PanelFn panel, PanelFn portable) {
    Random random(1);
    for (const size_t depth : {1, 6, 32, 96, 200}) {
        for (const Data data : {Data::Exact, Data::Realistic}) {
            constexpr size_t num_rows = kMaxPanelRows + 1;
            const size_t a_stride = depth + 3, size = depth * kBlockColumns;
            const bool exact = data == Data::Exact;
            std::vector<float> values = exact ? random.integers(size, -127, 127) : random.uniforms(size, -100, 100);
            const std::vector<uint8_t> stored = encode_panel(format, values);
            const std::vector<float> a =
                exact ? random.integers(num_rows * a_stride, -9, 9) : random.uniforms(num_rows * a_stride, -1, 1);
            Expected expected{std::vector<float>(num_rows * kBlockColumns), std::vector<double>(num_rows * kBlockColumns)};
            portable(a.data(), a_stride, num_rows, stored.data(), depth, expected.value.data(), kBlockColumns, false);
            for (size_t i = 0; i < (exact ? 0 : num_rows * size); i++) {
                const size_t row = i / size, k = i % size / kBlockColumns;
                expected.bound[row * kBlockColumns + i % kBlockColumns] +=
                    double(depth + 1) * kEpsilon * std::fabs(double(a[row * a_stride + k]) * values[i % size]);
            }
            const auto run = [&](size_t first, int rows, float* y, size_t stride, bool add) {
                panel(a.data() + first * a_stride, a_stride, rows, stored.data(), depth, y, stride, add);
            };
            check_rows(check, run, kMaxPanelRows, expected, where_of(data, depth));
        }
    }
}

// Groups of very different sizes, one of zeros, and one whose scale is 1, so that halves are rounded to even.
std::vector<float> quantizable(size_t n, Random& random) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) {
        const size_t group = i / kGroup;
        x[i] = random.uniform(-1, 1) * std::pow(10.0f, float(int(group % 9) * 8 - 32));
        if (group % 4 == 2) x[i] = 0;
        if (group % 4 == 3) x[i] = i % kGroup == 0 ? 127.0f : float(random.integer(-127, 126)) + 0.5f;
    }
    return x;
}

void check_quantize_row(Check& check, const Ops& ops) {
    Random random(2);
    for (const bool wide : {false, true}) for (const size_t k : {64, 320, 3072}) for (const float size : {0.0f, 1e-30f, 1.0f}) {
        std::vector<float> x = quantizable(k, random);
        for (float& value : x) value *= size;
        std::vector<int8_t> q[2];
        std::vector<float> scale[2];
        std::vector<int32_t> exponent[2], sum[2];
        for (int t = 0; t < 2; t++) {
            q[t].resize(k + 16, 7);
            scale[t].resize(k / kGroup + 1, 7);
            exponent[t].resize(k / kWideGroup + 1, 7);
            sum[t].resize(k / 16 + 1, 7);
            const Ops& table = t ? ops_portable() : ops;
            if (wide) scale[t][0] = table.quantize_wide(x.data(), k, q[t].data(), exponent[t].data(), sum[t].data());
            else table.quantize_row(x.data(), k, q[t].data(), scale[t].data(), sum[t].data());
        }
        check.same(q[0], q[1], "codes");
        check.same(scale[0], scale[1], "scales");
        check.same(exponent[0], exponent[1], "exponents");
        check.same(sum[0], sum[1], "sums");
    }
}

void check_quantize_vector(Check& check, const Ops& ops) {
    Random random(3);
    for (const size_t n : {16, 48, 80, 512}) {
        for (size_t group = 0; group < 9; group++) {
            std::vector<float> x = quantizable((group + 17) * kGroup, random);
            x.erase(x.begin(), x.begin() + ptrdiff_t(group * kGroup));
            std::vector<int8_t> q(n + 16, 7), expected = q;
            const float scale = ops.quantize_vector(x.data(), n, q.data());
            check.close(scale, ops_portable().quantize_vector(x.data(), n, expected.data()), 0, "scale");
            check.same(q, expected, "codes");
        }
    }
}

// Every half, every tie between two, their neighbours, and what lies beyond.
void check_to_f16(Check& check, const Ops& ops) {
    std::vector<float> x = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 65504, 65519, 65520, 65536, 1e-30f, -1e-45f, -0.0f};
    for (uint16_t h = 0; h < 0x7bff; h++) {
        const float value = from_f16(h), tie = value + 0.5f * (from_f16(uint16_t(h + 1)) - value);
        for (const float v : {value, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)}) x.push_back(h % 2 ? v : -v);
    }
    x.resize((x.size() + 15) / 16 * 16);
    std::vector<uint16_t> y(x.size() + 16, 7), expected = y;
    ops.to_f16(x.data(), x.size(), y.data());
    ops_portable().to_f16(x.data(), x.size(), expected.data());
    check.same(y, expected, "value");
}

void check_rms_norm(Check& check, const Ops& ops) {
    Random random(4);
    for (const size_t n : {1, 2, 7, 16, 23, 36, 97, 575, 3072, 3075}) {
        for (const bool exact : {true, false}) {
            const std::vector<float> x = exact ? random.integers(n, -50, 50) : random.uniforms(n, -3, 3);
            const std::vector<float> weight = random.uniforms(n, -2, 2);
            std::vector<float> y(n + 16, 7), expected = y;
            ops.rms_norm(x.data(), weight.data(), n, 1e-5f, y.data());
            ops_portable().rms_norm(x.data(), weight.data(), n, 1e-5f, expected.data());
            // 8 or more partial sums, and the square root halves their error.
            const double bound = exact ? 0 : (double(n) / 16 + 12) * kEpsilon;
            for (size_t i = 0; i < y.size(); i++)
                check.close(y[i], expected[i], i < n ? bound * std::fabs(expected[i]) : 0, "n = " + std::to_string(n));
        }
    }
}

void check_silu_mul(Check& check, const Ops& ops) {
    Random random(5);
    for (const size_t n : {1, 6, 16, 35, 2048}) {
        std::vector<float> gate = random.uniforms(n, -100, 100), up = random.uniforms(n, -2, 2);
        for (size_t i = 0; i < n; i += 3) gate[i] *= 0.05f;
        constexpr float special[] = {0, -88, 1e4f, -1e4f, 1e-30f};
        for (size_t i = 0; i < 5 && i < n; i++) gate[i] = special[i];
        std::vector<float> y(n + 16, 7), expected = y;
        ops.silu_mul(gate.data(), up.data(), n, y.data());
        ops_portable().silu_mul(gate.data(), up.data(), n, expected.data());
        for (size_t i = 0; i < y.size(); i++) {   // below -88 one side stops where the other goes on to 0
            const double bound = i < n ? 8 * kEpsilon * std::fabs(expected[i]) + 1e-30 : 0;
            check.close(y[i], expected[i], bound, "gate " + std::to_string(i < n ? gate[i] : 0));
        }
    }
}

// Integer sums: every instruction set gives the same bits, at the ends of the ranges too.
void check_values(Check& check, ValuesFn values, ValuesFn portable) {
    Random random(7);
    for (const bool extreme : {false, true}) {
        for (size_t num_panels = 1; num_panels <= kMaxPanels; num_panels += 7) {
            std::vector<std::vector<uint8_t>> data(num_panels);
            std::vector<const uint8_t*> panels;
            for (auto& panel : data) {
                for (size_t i = 0; i < 1024; i++) panel.push_back(uint8_t(extreme ? (i % 2 ? 0x81 : 0) : random.integer(0, 255)));
                for (uint8_t& code : panel) code = code == 0x80 ? 0 : code;   // int8 codes are -127 .. 127
                panels.push_back(panel.data());
            }
            const size_t stride = 32 * num_panels + 32;
            std::vector<uint8_t> high, low;
            for (size_t i = 0; i < kMaxValueRows * stride; i++) {
                high.push_back(uint8_t(extreme ? 127 : random.integer(0, 127)));
                low.push_back(uint8_t(extreme ? 127 : random.integer(0, 127)));
            }
            const std::vector<float> scale = random.uniforms(kMaxValueRows, 0, 1e-3f);
            for (size_t num_tokens = 32 * num_panels; num_tokens > 32 * (num_panels - 1); num_tokens--) {
                for (size_t i = 0; i < kMaxValueRows; i++) high[i * stride + num_tokens] = low[i * stride + num_tokens] = 0;
                for (int rows = 1; rows <= kMaxValueRows; rows++) {
                    std::vector<float> c(kMaxValueRows * 40, 7), expected = c;
                    values(panels.data(), num_tokens, {high.data(), low.data(), stride}, rows, scale.data(), c.data(), 40);
                    portable(panels.data(), num_tokens, {high.data(), low.data(), stride}, rows, scale.data(), expected.data(), 40);
                    check.same(c, expected, std::to_string(num_tokens) + " tokens, " + std::to_string(rows) + " rows");
                }
            }
        }
    }
}

void check_blend(Check& check, const Ops& ops) {
    Random random(7);
    for (const bool exact : {true, false}) {
        const std::vector<float> start = exact ? random.integers(112, -99, 99) : random.uniforms(112, -5, 5);
        const std::vector<float> y = exact ? random.integers(96, -99, 99) : random.uniforms(96, -5, 5);
        const float alpha = exact ? 3 : 0.123f, beta = exact ? -5 : 0.877f;
        std::vector<float> x = start, expected = start;
        ops.blend(alpha, x.data(), beta, y.data(), 96);
        ops_portable().blend(alpha, expected.data(), beta, y.data(), 96);
        for (size_t i = 0; i < 96; i++) {
            const double size = std::fabs(alpha * start[i]) + std::fabs(beta * y[i]);
            check.close(x[i], expected[i], exact ? 0 : 2 * kEpsilon * size, "value");
        }
        for (size_t i = 96; i < 112; i++) check.close(x[i], start[i], 0, "beyond the end");
    }
}

// `weights` are those without scales. Where a product lies next to the middle of two numbers either may come.
void check_quantized_softmax(Check& check, const Ops& ops, std::vector<float> scores, const std::vector<float>& weights, size_t n,
                             size_t low, size_t high, const Softmax& wanted, double sum_bound) {
    for (const float size : {0.0f, 1.0f}) {
        std::vector<float> s = scores, scale = Random(9).uniforms(n, 0, size);
        std::vector<uint8_t> high_plane(n + 16, 7), low_plane(n + 16, 7);
        const Softmax result = ops.quantized_softmax(s.data(), scale.data(), n, low, high, high_plane.data(), low_plane.data());
        check.close(result.max, wanted.max, 0, "quantised: maximum");
        check.close(result.sum, wanted.sum, sum_bound, "quantised: sum");
        double top = 0;
        for (size_t i = 0; i < n; i++) top = std::max(top, double(weights[i]) * scale[i]);
        check.close(result.unit, top / 16383, 8 * kEpsilon * top, "quantised: unit");
        for (size_t i = 0; i < n; i++) {
            check.close(std::max(high_plane[i], low_plane[i]) <= 127, true, 0, "quantised: 7 bits");
            const double number = 128 * high_plane[i] + low_plane[i], exact = top > 0 ? weights[i] * scale[i] / top * 16383 : 0;
            check.close(number, exact, 0.51, "quantised: weight " + std::to_string(i));
        }
        for (size_t i = n; i < high_plane.size(); i++) check.close(high_plane[i] + low_plane[i], 14, 0, "quantised: outside");
    }
}

void check_softmax(Check& check, const Ops& ops) {
    Random random(8);
    for (const size_t n : {32, 64, 256}) {
        const size_t ranges[][2] = {{0, n}, {0, 1}, {n - 1, n}, {5, 17}, {3, n - 2}, {0, 0}, {7, 7}, {n, n}};
        for (const auto& [low, high] : ranges) {
            for (const bool flat : {true, false}) {
                std::vector<float> s = flat ? std::vector<float>(n + 16, 2.5f) : random.uniforms(n + 16, -60, 60);
                constexpr float outside[] = {NAN, INFINITY, 1e30f, -INFINITY};   // never looked at
                for (size_t i = 0; i < n; i++)
                    if (i < low || i >= high) s[i] = outside[i % 4];
                std::vector<float> expected = s;
                const std::vector<float> scores = s;
                const Softmax result = ops.softmax(s.data(), n, low, high);
                const Softmax wanted = ops_portable().softmax(expected.data(), n, low, high);
                const std::string where = std::to_string(low) + " to " + std::to_string(high) + " of " + std::to_string(n);
                check.close(result.max, wanted.max, 0, "maximum of " + where);
                const double bound = flat || low == high ? 0 : (double(n) / 8 + 12) * kEpsilon * wanted.sum;
                check.close(result.sum, wanted.sum, bound, "sum of " + where);
                check_quantized_softmax(check, ops, scores, expected, n, low, high, wanted, bound);
                for (size_t i = 0; i < s.size(); i++) {   // powers of two stop at 2^-126 on one side
                    const bool exact = flat || i < low || i >= high;
                    check.close(s[i], expected[i], exact ? 0 : 4 * kEpsilon * expected[i] + 2e-38, where);
                }
            }
        }
    }
}

// Their results mean nothing; only that work is counted and that memory is read can be checked.
void check_calibration(Check& check, const Ops& ops) {
    check.close(ops.spin_int8(1) > 0, true, 0, "operations of one iteration");
    check.close(double(ops.spin_int8(30)), 3 * double(ops.spin_int8(10)), 0, "operations of 30 iterations");
    std::vector<uint8_t> data(4096);
    check.close(double(ops.read_bytes(data.data(), data.size())), 0, 0, "zeros");
    for (size_t at = 0; at < data.size(); at += 64) {
        data[at] = 1;
        check.close(ops.read_bytes(data.data(), data.size()) != 0, true, 0, "a bit at " + std::to_string(at));
        data[at] = 0;
    }
}

bool compare(const Ops& ops) {
    bool ok = true;
    const auto report = [&](const std::string& entry, const auto& function, const auto&... arguments) {
        Check check;
        function(check, arguments...);
        ok = check.print(ops.name, entry) && ok;
    };
    for (int kind = 0; kind < kNumKinds; kind++) {
        const char* name = kKindNames[kind];
        if (is_quantized(Kind(kind))) report(std::string("tile ") + name, check_tile, ops, Kind(kind));
        else report(std::string("panel ") + name, check_panel, name, ops.panel[kind], ops_portable().panel[kind]);
    }
    report("values 8", check_values, ops.values_8, ops_portable().values_8);
    report("values 4", check_values, ops.values_4, ops_portable().values_4);
    report("quantize_row", check_quantize_row, ops);
    report("quantize_vector", check_quantize_vector, ops);
    report("to_f16", check_to_f16, ops);
    report("rms_norm", check_rms_norm, ops);
    report("silu_mul", check_silu_mul, ops);
    report("blend", check_blend, ops);
    report("softmax", check_softmax, ops);
    report("calibration", check_calibration, ops);
    return ok;
}

}  // namespace

int main() {
    bool ok = true;
    for (const std::string& isa : available_isas()) {
        std::printf("available: %s\n", isa.c_str());
        if (isa != "portable") ok = compare(select_ops(isa)) && ok;
    }
    return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
