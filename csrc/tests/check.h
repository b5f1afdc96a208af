// What a comparison of kernels needs: reproducible random numbers, and the outcome of one entry.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace miniphi {

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int integer(int low, int high) { return low + int(engine_() % unsigned(high - low + 1)); }
    float uniform(float low, float high) { return low + (high - low) * float(engine_() >> 8) * 0x1p-24f; }
    std::vector<float> uniforms(size_t n, float low, float high) {
        std::vector<float> values(n);
        for (float& v : values) v = uniform(low, high);
        return values;
    }
    std::vector<float> integers(size_t n, int low, int high) {
        std::vector<float> values(n);
        for (float& v : values) v = float(integer(low, high));
        return values;
    }

private:
    std::mt19937 engine_;
};

// What became of one entry of a table.
class Check {
public:
    // |result - expected| <= bound; a bound of 0 demands equality.
    void close(double result, double expected, double bound, const std::string& where) {
        const double error = result == expected ? 0 : std::fabs(result - expected);
        if (bound > 0 && error / bound > worst_) worst_ = error / bound;
        if (!(error <= bound)) fail(where, result, expected);
    }
    template <typename T>
    void same(const std::vector<T>& result, const std::vector<T>& expected, const std::string& where) {
        for (size_t i = 0; i < expected.size(); i++)
            if (std::memcmp(&result[i], &expected[i], sizeof(T)) != 0)
                fail(where + " [" + std::to_string(i) + "]", double(result[i]), double(expected[i]));
    }
    bool print(const char* isa, const std::string& entry) const {
        if (failure_.empty()) std::printf("%s %s: ok, at most %.3f of the bound\n", isa, entry.c_str(), worst_);
        else std::printf("%s %s: FAILED, %s\n", isa, entry.c_str(), failure_.c_str());
        return failure_.empty();
    }

private:
    void fail(const std::string& where, double result, double expected) {
        if (!failure_.empty()) return;
        char numbers[96];
        std::snprintf(numbers, sizeof numbers, ": %.9g, expected %.9g", result, expected);
        failure_ = where + numbers;
    }

    std::string failure_;   // the first one
    double worst_ = 0;
};

}  // namespace miniphi
