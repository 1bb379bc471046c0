// A stub of libcublasLt.so that computes products with loops: the functions that llara calls, with the library's types written
// out. Layouts, alignments, workspace and types are checked as the library requires them. What the library may refuse, but a
// correct program never asks for, ends the process: llara would compute such a product with its own kernel.
#include "driver.h"
#include "record.h"

namespace {

enum Status { OK = 0, NOT_INITIALIZED = 1, INVALID = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, BF16 = 14 };
enum DescAttribute { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8 };
enum PreferenceAttribute { MAX_WORKSPACE = 1, REDUCTION_SCHEMES = 3, MIN_ALIGNMENT_A = 5 }; // B, C, D follow
enum Epilogue { EPILOGUE_NONE = 1, EPILOGUE_BIAS = 4 };
constexpr int COMPUTE_32F = 68;
constexpr size_t WORKSPACE = 1 << 20; // the least that an algorithm can do with
constexpr u64 MARK = 0x656d756c61746f72; // in an algorithm that the heuristic returned

struct Handle {
    char unused;
};
struct Desc {
    int transposed_a = 0, transposed_b = 0, epilogue = EPILOGUE_NONE;
    const void* bias = nullptr;
};
struct Layout { // column-major
    int type;
    u64 rows, cols;
    long long stride;
    size_t element() const { return type == BF16 ? 2 : 4; }
    size_t bytes() const { return cols ? ((cols - 1) * (u64)stride + rows) * element() : 0; }
};
struct Preference {
    size_t workspace = 0;
    u32 reduction = 0xffffffff;
    u32 alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
    u64 mark;
    u32 alignment[4];
    u64 workspace; // bytes: all that the preference allows
    u32 kinds; // of the operands
    u32 strides[4];
    u32 unused[3];
};
static_assert(sizeof(Algorithm) == 64);
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Product {
    Desc desc;
    Layout a, b, c, d;
    const void *a_at, *b_at, *c_at;
    void* d_at;
    float alpha, beta;
    u64 inner() const { return desc.transposed_a ? a.rows : a.cols; }
};

bool fits(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const u64 m = desc.transposed_a ? a.cols : a.rows, k = desc.transposed_a ? a.rows : a.cols;
    const u64 k_b = desc.transposed_b ? b.cols : b.rows, n = desc.transposed_b ? b.rows : b.cols;
    for (const Layout* l : {&a, &b, &c, &d})
        if (!l->rows || !l->cols || l->stride < (long long)l->rows) return false;
    // The library returns an error, which the caller may take for a product that it does not support.
    if (k != k_b || d.rows != m || d.cols != n || c.rows != m || c.cols != n) emu::fail("cublasLt: shapes that do not match");
    return a.type == b.type && c.type == d.type && (a.type == F32 ? d.type == F32 : true);
}

/// The types of left and result, and which operands are transposed.
u32 kinds_of(const Desc& desc, const Layout& a, const Layout& d) {
    return a.type | d.type << 8 | desc.transposed_a << 16 | desc.transposed_b << 17;
}

float load(const void* at, int type, size_t i) {
    return type == BF16 ? bf16_to_float(((const bf16*)at)[i]) : ((const float*)at)[i];
}

/// Element (row, col) of `at`, or of its transpose, at [col · rows + row].
std::vector<float> gather(const void* at, const Layout& l, bool transposed) {
    const u64 rows = transposed ? l.cols : l.rows, cols = transposed ? l.rows : l.cols;
    std::vector<float> out(rows * cols);
    for (u64 col = 0; col < cols; col++)
        for (u64 row = 0; row < rows; row++)
            out[col * rows + row] = load(at, l.type, transposed ? row * l.stride + col : col * l.stride + row);
    return out;
}

void run(const Product& p) {
    emu::driver::require_device(p.a_at, p.a.bytes(), "cublasLt: the left operand");
    emu::driver::require_device(p.b_at, p.b.bytes(), "cublasLt: the right operand");
    emu::driver::require_device(p.d_at, p.d.bytes(), "cublasLt: the result");
    if (p.beta != 0) emu::driver::require_device(p.c_at, p.c.bytes(), "cublasLt: the addend");
    const u64 m = p.d.rows, n = p.d.cols, k = p.inner();
    const std::vector<float> a = gather(p.a_at, p.a, p.desc.transposed_a); // [k][m]
    const std::vector<float> b = gather(p.b_at, p.b, p.desc.transposed_b); // [n][k]
    std::vector<float> sum(m);
    for (u64 col = 0; col < n; col++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (u64 i = 0; i < k; i++) {
            const float x = b[col * k + i];
            const float* row = &a[i * m];
            for (u64 r = 0; r < m; r++) sum[r] += row[r] * x;
        }
        for (u64 r = 0; r < m; r++) {
            float x = p.alpha * sum[r];
            if (p.beta != 0) x += p.beta * load(p.c_at, p.c.type, col * p.c.stride + r);
            if (p.desc.epilogue == EPILOGUE_BIAS) x += load(p.desc.bias, p.d.type, r);
            const size_t at = col * p.d.stride + r;
            if (p.d.type == BF16) ((bf16*)p.d_at)[at] = float_to_bf16(x);
            else ((float*)p.d_at)[at] = x;
        }
        emu::check::mark_written((char*)p.d_at + col * p.d.stride * p.d.element(), m * p.d.element());
    }
}

} // namespace

API cublasLtCreate(void** handle) {
    *handle = new Handle{};
    return OK;
}
API cublasLtDestroy(void* handle) {
    delete (Handle*)handle;
    return OK;
}
extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() { return 130100; }

API cublasLtMatrixLayoutCreate(void** layout, int type, u64 rows, u64 cols, long long stride) {
    if (type != F32 && type != BF16) return NOT_SUPPORTED;
    *layout = new Layout{type, rows, cols, stride};
    return OK;
}
API cublasLtMatrixLayoutDestroy(void* layout) {
    delete (Layout*)layout;
    return OK;
}
API cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return NOT_SUPPORTED; }
API cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    if (compute != COMPUTE_32F || scale != F32) return NOT_SUPPORTED;
    *desc = new Desc;
    return OK;
}
API cublasLtMatmulDescDestroy(void* desc) {
    delete (Desc*)desc;
    return OK;
}
API cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t bytes) {
    Desc& d = *(Desc*)desc;
    switch (attribute) {
    case DESC_TRANSA:
    case DESC_TRANSB:
        if (bytes != 4 || *(const int*)value > 1) return INVALID;
        (attribute == DESC_TRANSA ? d.transposed_a : d.transposed_b) = *(const int*)value;
        return OK;
    case DESC_EPILOGUE:
        if (bytes != 4) return INVALID;
        d.epilogue = *(const int*)value;
        return d.epilogue == EPILOGUE_NONE || d.epilogue == EPILOGUE_BIAS ? OK : NOT_SUPPORTED;
    case DESC_BIAS_POINTER:
        if (bytes != 8) return INVALID;
        memcpy(&d.bias, value, 8);
        return OK;
    default: return NOT_SUPPORTED;
    }
}
API cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference;
    return OK;
}
API cublasLtMatmulPreferenceDestroy(void* preference) {
    delete (Preference*)preference;
    return OK;
}
API cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    Preference& p = *(Preference*)preference;
    if (attribute == MAX_WORKSPACE && bytes == 8) memcpy(&p.workspace, value, 8);
    else if (attribute == REDUCTION_SCHEMES && bytes == 4) memcpy(&p.reduction, value, 4);
    else if (attribute >= MIN_ALIGNMENT_A && attribute < MIN_ALIGNMENT_A + 4 && bytes == 4)
        memcpy(&p.alignment[attribute - MIN_ALIGNMENT_A], value, 4);
    else return INVALID;
    return OK;
}
// There is an algorithm for any shape whose columns start at multiples of 4 bytes, if the pointers are aligned.
API cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                   int asked, void* results, int* found) {
    *found = 0;
    if (!handle || asked < 1) return INVALID;
    const Layout* layouts[] = {(Layout*)a, (Layout*)b, (Layout*)c, (Layout*)d};
    if (!fits(*(Desc*)desc, *layouts[0], *layouts[1], *layouts[2], *layouts[3])) return INVALID;
    const Preference& p = *(Preference*)preference;
    if (p.workspace < WORKSPACE) return NOT_SUPPORTED;
    for (int i = 0; i < 4; i++)
        if (layouts[i]->stride * layouts[i]->element() % 4 || p.alignment[i] % 4) return NOT_SUPPORTED;
    Heuristic& r = *(Heuristic*)results;
    memset(&r, 0, sizeof r);
    r.algorithm.mark = MARK;
    memcpy(r.algorithm.alignment, p.alignment, sizeof p.alignment);
    r.algorithm.kinds = kinds_of(*(Desc*)desc, *layouts[0], *layouts[3]);
    for (int i = 0; i < 4; i++) r.algorithm.strides[i] = (u32)layouts[i]->stride;
    r.workspace = r.algorithm.workspace = p.workspace;
    *found = 1;
    return OK;
}
API cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                   void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (!handle) return NOT_INITIALIZED;
    if (!algorithm || algorithm->mark != MARK) return INVALID;
    const Product p{*(Desc*)desc, *(Layout*)a_layout, *(Layout*)b_layout, *(Layout*)c_layout, *(Layout*)d_layout,
                    a, b, c, d, *(const float*)alpha, *(const float*)beta};
    if (!fits(p.desc, p.a, p.b, p.c, p.d)) return INVALID;
    // The real library refuses some of these calls, and computes others slowly.
    const u32 strides[] = {(u32)p.a.stride, (u32)p.b.stride, (u32)p.c.stride, (u32)p.d.stride};
    if (memcmp(strides, algorithm->strides, sizeof strides)) emu::fail("cublasLt: an algorithm for other leading dimensions");
    if (algorithm->kinds != kinds_of(p.desc, p.a, p.d)) emu::fail("cublasLt: an algorithm for other types or transpositions");
    const void* pointers[] = {a, b, p.beta != 0 ? c : d, d};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)pointers[i] % algorithm->alignment[i])
            emu::fail("cublasLt: operand " + std::to_string(i) + " is not aligned to the " +
                      std::to_string(algorithm->alignment[i]) + " bytes that the algorithm was chosen for");
    const size_t scratch = algorithm->workspace;
    if (workspace_bytes < scratch || !workspace || (uintptr_t)workspace % 256)
        emu::fail("cublasLt: a workspace that is too small for the algorithm, or not aligned");
    emu::record::log("product %s %s %llu,%llu,%llu %g", p.a.type == BF16 ? "bf16" : "f32", p.d.type == BF16 ? "bf16" : "f32",
                     p.d.cols, p.d.rows, p.inner(), p.beta);
    if (emu::record::dry()) return OK;
    return emu::driver::enqueue(stream, [=] {
        // The real library writes to the workspace; overwriting it detects other uses of this memory.
        emu::driver::require_device(workspace, scratch, "cublasLt: the workspace");
        memset(workspace, 0xff, WORKSPACE);
        memset((char*)workspace + scratch - 4096, 0xff, 4096);
        run(p);
    }) ? EXECUTION_FAILED : OK;
}
