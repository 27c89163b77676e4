// The step of rule `base` for many tensors on the CPU, without headers of torch: pointers and sizes come in a table.
//
// `lopt.rules.lopt_base` is the definition: measure, move and finish there are `measure` and `step` here, in the same
// order up to rounding. Matrices are [rows, columns] in C order; every tensor is there `batch` times, at strides.
// Compiled by `lopt_kernels.host.compiled` for the processor at hand; float is IEEE binary32, all products are own.

#include "vectors.h"

namespace {

struct Constants {  // of the rule
    float momentum, second, factors, ridge, tiny, smallest_norm, least_lines;
};

// -- bases ----------------------------------------------------------------------------------------------------------

// x -= tau v (v' x) in N vectors of columns, for rows from `first` on; x [n, ld].
template <int N>
void reflect_columns(float* x, int64_t n, int64_t ld, const float* v, float tau, int64_t first) {
    Vec sum[N] = {};
    for (int64_t i = first; i < n; i++)
        for (int s = 0; s < N; s++) sum[s] += v[i] * load(x + i * ld + s * W);
    for (int s = 0; s < N; s++) sum[s] *= tau;
    for (int64_t i = first; i < n; i++)
        for (int s = 0; s < N; s++) store(x + i * ld + s * W, load(x + i * ld + s * W) - v[i] * sum[s]);
}

// The same in the vectors of columns from `begin` to `end`.
void reflect(float* x, int64_t n, int64_t ld, const float* v, float tau, int64_t first, int64_t begin, int64_t end) {
    int64_t j = begin / W * W;
    for (; end - j > 3 * W; j += 4 * W) reflect_columns<4>(x + j, n, ld, v, tau, first);
    if (end - j > 2 * W)
        reflect_columns<3>(x + j, n, ld, v, tau, first);
    else if (end - j > W)
        reflect_columns<2>(x + j, n, ld, v, tau, first);
    else if (end > j)
        reflect_columns<1>(x + j, n, ld, v, tau, first);
}

// The reflection that makes 0 of column k of x [n, ld] below its diagonal, as v from element k on, and its tau.
float find_reflection(const float* x, int64_t n, int64_t ld, int64_t k, float* v) {
    for (int64_t i = k + 1; i < n; i++) v[i] = x[i * ld + k];
    v[k] = 1;
    Vec squares = {};
    for (int64_t i = k + 1; i < n; i += W) {
        const Vec some = load_some(v + i, n - i);
        squares += some * some;
    }
    const double rest = add_up(squares), alpha = x[k * ld + k];
    if (rest == 0) return 0;
    const double norm = sqrt(alpha * alpha + rest), beta = alpha > 0 ? -norm : norm;
    const float scale = float(1 / (alpha - beta));
    for (int64_t i = k + 1; i < n; i++) v[i] *= scale;
    return float((beta - alpha) / beta);
}

constexpr int64_t SMALL = 96;  // sides of which reflections are applied one by one
constexpr int64_t PANEL = 16;  // of others, reflections that products apply together (Schreiber and Van Loan 1989)

struct Block {  // reflections k .. k + count as 1 - V T V': V' is vs[k], T [PANEL, PANEL] is upper triangular
    int64_t k, count;
    float t[PANEL * PANEL];
};

void find_triangle(const float* vs, const float* taus, int64_t n, Block& block, float* panel) {
    float gram[PANEL * PANEL];
    const View v = {vs + block.k * n + block.k, n, 1};
    multiply(block.count, block.count, n - block.k, v, v.flip(), gram, PANEL, panel);
    for (int64_t j = 0; j < block.count; j++) {
        const float tau = taus[block.k + j];
        for (int64_t i = 0; i < PANEL; i++) {
            float sum = 0;
            for (int64_t l = i; l < j; l++) sum += block.t[i * PANEL + l] * gram[l * PANEL + j];
            block.t[i * PANEL + j] = i < j ? -tau * sum : i == j ? tau : 0;
        }
    }
}

// x -= V (T or T') V' x in columns from `begin` on; room: 2 PANEL ld floats.
void reflect_block(float* x, int64_t n, int64_t ld, const float* vs, const Block& block, bool flipped, int64_t begin,
                   float* room, float* panel) {
    const int64_t k = block.k, rows = n - k, columns = ld - begin;
    if (columns <= 0) return;
    float *inner = room, *outer = room + PANEL * ld, *part = x + k * ld + begin;
    const View v = {vs + k * n + k, n, 1}, t = {block.t, PANEL, 1};
    multiply(block.count, columns, rows, v, {part, ld, 1}, inner, ld, panel);
    multiply(block.count, columns, block.count, flipped ? t.flip() : t, {inner, ld, 1}, outer, ld, panel);
    for (int64_t i = 0; i < block.count; i++)
        for (int64_t j = 0; j < columns; j += W) store(outer + i * ld + j, -load(outer + i * ld + j));
    multiply(rows, columns, block.count, v.flip(), {outer, ld, 1}, part, ld, panel, true);
}

// The orthogonal factor of x [n, ld] by Householder's reflections, with LAPACK's signs, as q [n, ld]; x is lost.
// vs: room for n * n + n + 2 PANEL ld floats.
void orthogonalise(float* x, int64_t n, int64_t ld, float* q, float* vs, float* panel) {
    float *taus = vs + n * n, *room = taus + n;
    memset(vs, 0, 4 * n * n);
    // Few columns are sooner done by one reflection after the other.
    const int64_t size = n > SMALL ? PANEL : n;
    const auto reflect_many = [&](float* to, int64_t k, int64_t count, bool flipped, int64_t begin) {
        Block block = {k, count, {}};
        find_triangle(vs, taus, n, block, panel);
        reflect_block(to, n, ld, vs, block, flipped, begin, room, panel);
    };
    for (int64_t k = 0; k < n; k += size) {
        const int64_t end = n - k < size ? n : k + size;
        for (int64_t j = k; j < end; j++) {
            taus[j] = find_reflection(x, n, ld, j, vs + j * n);
            reflect(x, n, ld, vs + j * n, taus[j], j, j, end);  // what is left of j is not looked at again
        }
        if (end < n) reflect_many(x, k, size, true, end);
    }
    memset(q, 0, 4 * n * ld);
    for (int64_t k = 0; k < n; k++) q[k * ld + k] = 1;
    if (size == n)
        for (int64_t k = n - 1; k >= 0; k--) reflect(q, n, ld, vs + k * n, taus[k], k, k, n);
    else
        for (int64_t k = (n - 1) / size * size; k >= 0; k -= size)
            reflect_many(q, k, n - k < size ? n - k : size, false, k);
}

// Two steps of orthogonal iteration at once from `old` towards the eigenvectors of `factor`, all [n, n] in lines of `line`; where
// it is not `dense`, it counts as 0, and the basis stays as it is. work: room for 4 n (pad(n) + 1) + 2 PANEL pad(n) floats.
void renew_basis(const float* factor, const float* old, float* basis, int64_t n, int64_t line, bool dense, float ridge,
                 float* work, float* panel) {
    const int64_t ld = pad(n);
    float *relative = work, *x = relative + n * ld, *q = x + n * ld, *vs = q + n * ld;
    float trace = 0;
    for (int64_t i = 0; i < n; i++) trace += factor[i * line + i];
    const float scale = dense && trace > 0 ? 1 / trace : 0;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) relative[i * ld + j] = factor[i * line + j] * scale;
        for (int64_t j = n; j < ld; j++) relative[i * ld + j] = 0;
        relative[i * ld + i] += ridge;
    }
    bool begins = true;
    for (int64_t i = 0; i < n && begins; i++)
        for (int64_t j = 0; j < n && begins; j++) begins = old[i * line + j] == 0;
    if (begins)
        memcpy(q, relative, 4 * n * ld);
    else
        multiply(n, n, n, {relative, ld, 1}, {old, line, 1}, q, ld, panel);
    multiply(n, n, n, {relative, ld, 1}, {q, ld, 1}, x, ld, panel);
    for (int64_t i = 0; i < n; i++) memset(x + i * ld + n, 0, 4 * (ld - n));
    orthogonalise(x, n, ld, q, vs, panel);
    for (int64_t i = 0; i < n; i++) memcpy(basis + i * line, q + i * ld, 4 * n);
}

// -- one tensor -----------------------------------------------------------------------------------------------------

struct Place {  // in every batch: `at + b * stride`; null where there is none
    float* at;
    int64_t stride;
    float* of(int64_t b) const { return at == nullptr ? nullptr : at + b * stride; }
};

struct Tensor {  // a row of the table; `new_` may be the same places
    // blocks: lines of each; is_compact: factors and bases are bfloat16, and so are the strides of their places.
    int64_t rows, columns, is_matrix, left_block, right_block, is_compact;
    Place g, p, m, v, left_factor, left_basis, right_factor, right_basis;
    Place new_p, new_m, new_v, new_left_factor, new_left_basis, new_right_factor, new_right_basis;
};

inline uint16_t* half(const Place& place, int64_t b) {
    return place.at == nullptr ? nullptr : reinterpret_cast<uint16_t*>(place.at) + b * place.stride;
}

void widen(const uint16_t* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = uint32_t(from[i]) << 16;
        memcpy(to + i, &bits, 4);
    }
}

// To the nearest, of two the even one; what is no number stays so.
void narrow(const float* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        to[i] = from[i] != from[i] ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

struct Kept {  // of a side: factor and basis, and where new ones go; null where there are none
    const float *factor, *basis;
    float *new_factor, *new_basis;
};

inline Vec average(Vec now, Vec old, float share) { return old - (old - now) * (1 - share); }

struct Sums {  // over a step, for `measure_step`
    static constexpr int N = 5, BLOCK = 1024;
    Vec uu = {}, au = {}, aa = {}, mm = {}, vv = {};
    double total[N] = {};
    int taken = 0;

    // Takes W elements with their new moments, and gives back the direction.
    Vec take(Vec g, Vec m, Vec v, const Constants& c) {
        const Vec root = invert_root(v + c.tiny), u = average(g, m, c.momentum) * root, a = g * root;
        uu += u * u, au += a * u, aa += a * a, mm += m * m, vv += v;
        if (++taken == BLOCK) fold();
        return u;
    }
    // Many numbers are added up in parts, so that rounding does not add up, too.
    void fold() {
        Vec* parts[N] = {&uu, &au, &aa, &mm, &vv};
        for (int i = 0; i < N; i++) total[i] += add_up(*parts[i]), *parts[i] = Vec{};
        taken = 0;
    }
    void write(float* out, int64_t count, float tiny) {
        fold();
        total[N - 1] += double(count) * tiny;
        for (int i = 0; i < N; i++) out[i] = float(total[i]);
    }
};

struct Number {  // of one tensor in one batch
    float size, decay, lr, weight_decay;
    bool due;
};

inline float find_factor(const float* products, int64_t count, const Number& number, const Constants& c) {
    return number.size * -sqrtf(float(count)) / (sqrtf(products[0]) + c.smallest_norm);
}

// p + lr (factor u - decay p), after the user's own decay.
inline Vec move(Vec p, Vec u, float factor, const Number& number) {
    const Vec delta = u * factor - p * number.decay;
    return p - p * (number.lr * number.weight_decay) + delta * number.lr;
}

void step_plain(const Tensor& t, int64_t b, const Number& number, const Constants& c, float* products) {
    const int64_t n = t.rows * t.columns;
    const float *g = t.g.of(b), *p = t.p.of(b), *m = t.m.of(b), *v = t.v.of(b);
    float *new_p = t.new_p.of(b), *new_m = t.new_m.of(b), *new_v = t.new_v.of(b);
    Sums sums;
    for (int64_t i = 0; i < n; i += W) {
        const Vec x = load_some(g + i, n - i);
        const Vec one = average(x, load_some(m + i, n - i), c.momentum);
        const Vec two = average(x * x, load_some(v + i, n - i), c.second);
        sums.take(x, one, two, c);
        store_some(new_m + i, one, n - i);
        store_some(new_v + i, two, n - i);
    }
    sums.write(products, n, c.tiny);
    const float factor = find_factor(products, n, number, c);
    for (int64_t i = 0; i < n; i += W) {
        const Vec ahead = average(load_some(g + i, n - i), load_some(new_m + i, n - i), c.momentum);
        const Vec u = ahead * invert_root(load_some(new_v + i, n - i) + c.tiny);
        store_some(new_p + i, move(load_some(p + i, n - i), u, factor, number), n - i);
    }
}

// One side of a matrix: n lines in blocks, whose squares lie below each other, in lines of `block`, or beside.
struct Side {
    int64_t n, block, line, step;  // step: from one square to the next
    bool below;
    static Side of_rows(const Tensor& t) { return {t.rows, t.left_block, t.left_block, t.left_block, true}; }
    static Side of_columns(const Tensor& t) { return {t.columns, t.right_block, t.columns, 1, false}; }
    int64_t size(int64_t first) const { return n - first < block ? n - first : block; }
};

// The factor of the block that begins with line `first`; what only fills it up is 0.
void update_factor(const float* from, float* to, const float* square, int64_t ld, const Side& side, int64_t first,
                   float share) {
    const int64_t n = side.size(first), lines = side.below ? n : side.block, width = side.below ? side.block : n;
    for (int64_t i = 0; i < lines; i++)
        for (int64_t j = 0; j < width; j++) {
            const int64_t k = first * side.step + i * side.line + j;
            to[k] = i < n && j < n ? from[k] - (from[k] - square[i * ld + j]) * (1 - share) : 0;
        }
}

// Whether enough of the n lines of x [n, m] have a gradient to find a basis for them.
bool is_dense(View x, int64_t n, int64_t m, float least) {
    int64_t lines = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m; j++)
            if (x.at[i * x.row + j * x.column] != 0) {
                lines++;
                break;
            }
    return float(lines) >= least * float(n);
}

// The factors with x's second moments in them, x [n, m], and the bases that are in force, renewed where that is due.
const float* turn(View x, int64_t m, const Side& side, const Kept& kept, bool due, const Constants& c, float* room,
                  float* panel) {
    if (kept.factor == nullptr) return nullptr;
    const bool dense = due && is_dense(x, side.n, m, c.least_lines);
    if (kept.new_basis != nullptr && kept.new_basis != kept.basis)
        memcpy(kept.new_basis, kept.basis, 4 * side.n * side.block);
    for (int64_t first = 0; first < side.n; first += side.block) {
        const int64_t n = side.size(first), at = first * side.step;
        const View lines = {x.at + first * x.row, x.row, x.column};
        multiply(n, n, m, lines, lines.flip(), room, pad(n), panel);
        update_factor(kept.factor, kept.new_factor, room, pad(n), side, first, c.factors);
        if (due)
            renew_basis(kept.new_factor + at, kept.basis + at, kept.new_basis + at, n, side.line, dense, c.ridge, room,
                        panel);
    }
    return due ? kept.new_basis : kept.basis;
}

// What `turn` works on: the places themselves, or where they are compact, `wide`, with room for twice `size` floats.
Kept open_side(const Place& factor, const Place& basis, const Place& new_factor, const Place& new_basis, int64_t b,
               int64_t size, bool compact, float* wide) {
    if (!compact || factor.at == nullptr) return {factor.of(b), basis.of(b), new_factor.of(b), new_basis.of(b)};
    widen(half(factor, b), size, wide);
    widen(half(basis, b), size, wide + size);
    return {wide, wide + size, wide, wide + size};
}

void close_side(const Kept& kept, const Place& new_factor, const Place& new_basis, int64_t b, int64_t size,
                bool compact) {
    if (!compact || kept.factor == nullptr) return;
    narrow(kept.new_factor, size, half(new_factor, b));
    if (new_basis.at != nullptr) narrow(kept.new_basis, size, half(new_basis, b));
}

// Floats that both sides of a tensor need for that.
int64_t count_wide(const Tensor& t) {
    const int64_t left = t.left_factor.at == nullptr ? 0 : t.rows * t.left_block;
    const int64_t right = t.right_factor.at == nullptr ? 0 : t.columns * t.right_block;
    return t.is_compact ? 2 * (left + right) : 0;
}

void step_rotated(const Tensor& t, int64_t b, const Number& number, const Constants& c, float* products, float* work,
                  float* panel) {
    const int64_t R = t.rows, C = t.columns, ld = pad(C), n = R * C;
    // Lines of gradient and momentum alternate, so that both are rotated by the same products: [R, 2 ld] or [2 R, ld].
    float *x = work, *y = work + 2 * R * ld, *wide = work + 4 * R * ld, *room = wide + count_wide(t);
    const float *g = t.g.of(b), *m = t.m.of(b);
    float* new_m = t.new_m.of(b);
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < ld; j += W) {
            const int64_t k = i * C + j, left = C - j;
            const Vec now = load_some(g + k, left), one = average(now, load_some(m + k, left), c.momentum);
            store(x + 2 * i * ld + j, now);
            store(x + (2 * i + 1) * ld + j, one);
            store_some(new_m + k, one, left);
        }
    const View gradient = {x, 2 * ld, 1};
    const Side rows = Side::of_rows(t), columns = Side::of_columns(t);
    const bool compact = t.is_compact;
    const int64_t above = t.left_factor.at == nullptr ? 0 : R * t.left_block, beside = C * t.right_block;
    const Kept over = open_side(t.left_factor, t.left_basis, t.new_left_factor, t.new_left_basis, b, above, compact,
                                wide);
    const Kept next = open_side(t.right_factor, t.right_basis, t.new_right_factor, t.new_right_basis, b, beside,
                                compact, wide + 2 * above);
    const float* left = turn(gradient, C, rows, over, number.due, c, room, panel);
    const float* right = turn(gradient.flip(), R, columns, next, number.due, c, room, panel);
    close_side(over, t.new_left_factor, t.new_left_basis, b, above, compact);
    close_side(next, t.new_right_factor, t.new_right_basis, b, beside, compact);
    if (left != nullptr) {
        for (int64_t i = 0; i < R; i += rows.block)
            multiply(rows.size(i), 2 * ld, rows.size(i), View{left + i * rows.step, rows.line, 1}.flip(),
                     {x + 2 * i * ld, 2 * ld, 1}, y + 2 * i * ld, 2 * ld, panel);
        float* other = x;
        x = y, y = other;
    }
    if (right != nullptr) {
        for (int64_t i = 0; i < 2 * R && ld > C; i++) memset(y + i * ld + C, 0, 4 * (ld - C));
        for (int64_t j = 0; j < C; j += columns.block)
            multiply(2 * R, columns.size(j), columns.size(j), {x + j, ld, 1}, {right + j, columns.line, 1}, y + j, ld,
                     panel);
        float* other = x;
        x = y, y = other;
    }
    const float* v = t.v.of(b);
    float* new_v = t.new_v.of(b);
    Sums sums;
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < ld; j += W) {
            const Vec now = load(x + 2 * i * ld + j), one = load(x + (2 * i + 1) * ld + j);
            const Vec two = average(now * now, load_some(v + i * C + j, C - j), c.second);
            store(y + i * ld + j, sums.take(now, one, two, c));
            store_some(new_v + i * C + j, two, C - j);
        }
    sums.write(products, n, c.tiny);
    if (left != nullptr) {
        for (int64_t i = 0; i < R; i += rows.block)
            multiply(rows.size(i), ld, rows.size(i), {left + i * rows.step, rows.line, 1}, {y + i * ld, ld, 1},
                     x + i * ld, ld, panel);
        float* other = x;
        x = y, y = other;
    }
    if (right != nullptr) {
        for (int64_t j = 0; j < C; j += columns.block)
            multiply(R, columns.size(j), columns.size(j), {y + j, ld, 1}, View{right + j, columns.line, 1}.flip(), x + j,
                     ld, panel);
        y = x;
    }
    const float factor = find_factor(products, n, number, c);
    const float* p = t.p.of(b);
    float* new_p = t.new_p.of(b);
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < C; j += W) {
            const int64_t k = i * C + j, count = C - j;
            store_some(new_p + k, move(load_some(p + k, count), load(y + i * ld + j), factor, number), count);
        }
}

}  // namespace

extern "C" {

// Floats of work that `lopt_step` needs.
int64_t lopt_work(const Tensor* tensors, int64_t count, int64_t) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t rows = tensors[i].rows, columns = tensors[i].columns;
        const int64_t left = tensors[i].left_factor.at == nullptr ? 0 : tensors[i].left_block;
        const int64_t right = tensors[i].right_factor.at == nullptr ? 0 : tensors[i].right_block;
        const int64_t n = left > right ? left : right;
        const int64_t turning = 4 * n * (pad(n) + 1) + 2 * PANEL * pad(n) + count_wide(tensors[i]);
        const int64_t need = n > 0 ? 4 * rows * pad(columns) + turning : 0;
        most = need > most ? need : most;
    }
    return KC * NR + most;
}

// Means of the squares of p and of where g is 0: [2, batch, count].
void lopt_measure(const Tensor* tensors, int64_t count, int64_t batch, float* means) {
    FlushToZero flush;
    for (int64_t i = 0; i < count; i++)
        for (int64_t b = 0; b < batch; b++) {
            const int64_t n = tensors[i].rows * tensors[i].columns;
            const float *g = tensors[i].g.of(b), *p = tensors[i].p.of(b);
            double sum = 0;
            int64_t zeros = 0;
            for (int64_t k = 0; k < n;) {
                Vec part = {};
                for (const int64_t end = k + 1024 * W; k < n && k < end; k += W) {
                    const Vec x = load_some(p + k, n - k);
                    part += x * x;
                }
                sum += add_up(part);
            }
            for (int64_t k = 0; k < n; k++) zeros += g[k] == 0;
            means[b * count + i] = float(sum / (n > 0 ? n : 1));
            means[(batch + b) * count + i] = float(double(zeros) / (n > 0 ? n : 1));
        }
}

// One step; numbers [batch, count] and products [batch, count, 5] in C order, rates [count, 2].
void lopt_step(const Tensor* tensors, int64_t count, int64_t batch, const float* size, const float* decay,
               const uint8_t* due, const float* rates, const Constants* constants, float* products, float* work) {
    FlushToZero flush;
    for (int64_t i = 0; i < count; i++)
        for (int64_t b = 0; b < batch; b++) {
            const Tensor& t = tensors[i];
            const int64_t k = b * count + i;
            const Number number = {size[k], t.is_matrix ? decay[k] : 0, rates[2 * i], rates[2 * i + 1], due[k] != 0};
            if (t.left_factor.at == nullptr && t.right_factor.at == nullptr)
                step_plain(t, b, number, *constants, products + Sums::N * k);
            else
                step_rotated(t, b, number, *constants, products + Sums::N * k, work + KC * NR, work);
        }
}
}
