// How large a step each tensor takes under rule `base`, for all tensors and batches: a few numbers of each.
//
// The definitions are `Base.decide_together` of `lopt.rules.lopt_base`, and `StepController.forward` and `measure_step`
// of `lopt.rules.building_blocks.step_controller`, in the same order up to rounding. Arrays are in C order, of B
// batches and n tensors; float is IEEE binary32.

#include "vectors.h"

namespace {

constexpr int FEATURES = 7, HIDDEN = 6, OUTPUTS = 2;

struct Weights {  // a meta-weight: of the rule, or of each batch at a stride
    const float* at;
    int64_t stride;
    const float* of(int64_t b) const { return at + b * stride; }
};

struct Rule {
    Weights log_size, log_vector, log_relative, depth, log_decay, direct, readout, hidden;
};

struct Rows {  // of every tensor: [B, n, 1], and measured [B, n, 2]
    float *scale, *gain, *agreement, *measured;
};

struct Run {  // [B, columns], which are 1 or n
    const int64_t *step, *now;
    const float *planned, *schedule;
    int64_t columns;
};

struct Constants {
    float tiny, smallest_scale, scale_of_zero, least_active;
    float lowest, highest, gain_range, rate, share, average, smallest_share;
    float matrices, every, eager;
    float output_scales[OUTPUTS];
};

// As torch's: what is no number stays so.
inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float least(float a, float b) { return a < b || a != a ? a : b; }
inline float most(float a, float b) { return a > b || a != a ? a : b; }
inline float lerp(float a, float b, float w) { return w < 0.5f ? a + w * (b - a) : b - (b - a) * (1 - w); }

// Step and rate, before their scales: A f + C tanh(B f).
void run_network(const float* x, const Rule& rule, int64_t b, float* out) {
    const float *direct = rule.direct.of(b), *readout = rule.readout.of(b), *hidden = rule.hidden.of(b);
    for (int o = 0; o < OUTPUTS; o++) {
        out[o] = 0;
        for (int f = 0; f < FEATURES; f++) out[o] += direct[o * FEATURES + f] * x[f];
    }
    for (int h = 0; h < HIDDEN; h++) {
        float sum = 0;
        for (int f = 0; f < FEATURES; f++) sum += hidden[h * FEATURES + f] * x[f];
        for (int o = 0; o < OUTPUTS; o++) out[o] += readout[o * HIDDEN + h] * tanhf(sum);
    }
}

}  // namespace

extern "C" {

// The new rows, and of every tensor the size of its step, its decay, and whether its bases are due, [B, n] each.
// means: of the squares of p, and of where g is 0, [2, B, n]; shapes: what `describe_shapes` says, [n, 4].
void lopt_decide(int64_t n, int64_t batch, const Rule* rule, const Rows* old, const Rows* fresh, const Run* run,
                 const Constants* constants, const float* means, const float* shapes, float* size, float* decay,
                 uint8_t* due) {
    const Constants& c = *constants;
    for (int64_t b = 0; b < batch; b++) {
        const auto clock = [&](int64_t i) { return b * run->columns + (run->columns == 1 ? 0 : i); };
        float agreement = 0, gains = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t k = b * n + i;
            const float power = means[k], rms = sqrtf(power + c.tiny);
            const float begin = power > c.tiny ? most(rms, c.smallest_scale) : c.scale_of_zero;
            fresh->scale[k] = most(run->step[clock(i)] == 0 ? begin : old->scale[k], c.smallest_scale);
            if (fresh->scale[k] == 1) gains += shapes[4 * i + 3];
        }
        const float depth = logf(most(c.matrices / (1 + gains), 1));
        for (int64_t i = 0; i < n; i++) {
            const int64_t k = b * n + i, t = clock(i);
            const float active = most(1 - means[batch * n + k], c.least_active), vector = shapes[4 * i];
            float absolute = *rule->log_size.of(b) - *rule->depth.of(b) * depth;
            if (c.matrices > 0) absolute += *rule->log_vector.of(b) * vector;
            // What is normalised may start at any scale: a matrix that starts small is none that has to stay so.
            const bool free = gains > 0 && vector == 0;
            const float scale = free ? most(fresh->scale[k], shapes[4 * i + 2]) : fresh->scale[k];
            const float relative = *rule->log_relative.of(b) + logf(scale / active);
            size[k] = expf(least(absolute, relative)) * run->schedule[t];
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t k = b * n + i;
            const float weight = most(1 / (float(run->step[clock(i)]) + 1), c.average);
            fresh->agreement[k] = lerp(old->agreement[k], old->measured[2 * k], weight);
            agreement += fresh->agreement[k] * shapes[4 * i + 1];
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t k = b * n + i, t = clock(i);
            const float planned = run->planned[t], progress = least(float(run->now[t]) / planned, 1);
            const float rms = sqrtf(means[k] + c.tiny), scale = fresh->scale[k];
            const float growth = logf((rms + c.tiny) / (scale + c.tiny));
            const float x[FEATURES] = {1,
                                       2 * progress - 1,
                                       expf(-10 * progress),
                                       3 * fresh->agreement[k],
                                       3 * agreement,
                                       old->measured[2 * k + 1],
                                       clamp(growth, -2, 4) / 2};
            float out[OUTPUTS];
            run_network(x, *rule, b, out);
            const float gain = old->gain[k] + c.rate * (out[1] * c.output_scales[1]) / (10 + c.share * planned);
            fresh->gain[k] = clamp(gain, -c.gain_range, c.gain_range);
            const float highest = c.highest + most(fresh->gain[k], 0);
            size[k] *= expf(clamp(out[0] * c.output_scales[0] + fresh->gain[k], c.lowest, highest));
            const float active = most(1 - means[batch * n + k], c.least_active);
            const float kept = expf(*rule->log_decay.of(b)) * (1 - shapes[4 * i]) * active;
            decay[k] = kept * size[k] / most(scale, shapes[4 * i + 2]);
            due[k] = run->step[t] % int64_t(c.every) == 0 || run->step[t] < int64_t(c.eager);
        }
    }
}

// What the controller hears of a step, [B, n, 2], from its products [B, n, 5]; step: [B, columns], before it; kept: share
// of the momentum before it.
void lopt_review(int64_t n, int64_t batch, const int64_t* step, int64_t columns, const float* products,
                 const Constants* constants, float kept, float momentum, float second, float* measured) {
    const Constants& c = *constants;
    const float share = 1 - kept;
    for (int64_t k = 0; k < n * batch; k++) {
        const double updates = double(step[columns == 1 ? k / n : k] + 1);
        const float first = float(1 - pow(momentum, updates)), other = float(1 - pow(second, updates));
        const float *x = products + 5 * k, uu = x[0], au = x[1], aa = x[2], mm = x[3], power = x[4];
        const float along = au - share * aa, square = most(uu - share * (au + along), 0);
        const bool known = square > c.smallest_share * kept * kept * uu;
        const float noise = (mm / (first * first) + c.tiny) / (power / other + c.tiny);
        measured[2 * k] = known ? clamp(along / (sqrtf(square + c.tiny) * sqrtf(aa + c.tiny)), -1, 1) : 0;
        measured[2 * k + 1] = clamp(logf(noise), -8, 2) / 4 + 0.75f;
    }
}
}
