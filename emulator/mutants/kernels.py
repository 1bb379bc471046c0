"""Defects of the kernels other than attention (those are in mutate.py): name, edits, and the reason if no test can
detect it.

An edit is (file, text, replacement); `@` in a replacement stands for the condition under which the defect is active.
"""

ELEMENTS, GEMM, NORMS, ROWS = "elements.cuh", "gemm.cu", "norms.cu", "rows.cu"
POINTWISE, OBJECTIVE, PRELUDE = "pointwise.cu", "objective.cu", "prelude.cuh"


def chosen(file, right, wrong):
    """An edit that replaces an expression."""
    return file, right, f"(@ ? ({wrong}) : ({right}))"


def skipped(file, before, statement, after=""):
    """An edit that leaves a statement out; `before` and `after` are its surroundings, which identify it."""
    return file, before + statement + after, f"{before}if (!@) {statement}{after}"


BARRIER = "__syncthreads();"
MUTANTS = [
    ("elements: f32 read past the end of a row", [(ELEMENTS, "x[i] = i < count ? p[i]", "x[i] = @ || i < count ? p[i]")]),
    ("elements: bf16 read past the end of a row", [(ELEMENTS, "x[i] = i < count ? bf16_to_float", "x[i] = @ || i < count ? bf16_to_float")]),
    ("elements: f32 written past the end of a row", [(ELEMENTS, "if (i < count) p[i] = x[i];", "if (@ || i < count) p[i] = x[i];")]),
    ("elements: bf16 written past the end of a row", [(ELEMENTS, "if (i < count) p[i] = float_to_bf16", "if (@ || i < count) p[i] = float_to_bf16")]),
    ("elements: the incomplete octet of a row is missing", [chosen(ELEMENTS, "(columns + OCTET - 1) / OCTET", "columns / OCTET")]),
    ("elements: bf16 stored in the wrong order", [chosen(ELEMENTS, "pack_bf16(x[4], x[5])", "pack_bf16(x[5], x[4])")]),
    ("elements: wrong half of f32 octets", [(ELEMENTS, "high = load16(p + 4)", "high = load16(p + (@ ? 0 : 4))")]),
    ("elements: wrong remainder", [chosen(ELEMENTS, "(u32)x - q * (u32)by", "(u32)x - q")]),
    ("sums: no barrier before parts are overwritten", [skipped(ELEMENTS, "x = warp_sum(x);\n    ", BARRIER)],
     "no kernel computes two sums of one type; the barrier is for those that will"),
    ("sums: no barrier before parts are read", [
        skipped(ELEMENTS, "parts[threadIdx.x / 32] = x;\n    ", BARRIER, "\n    T total = 0;")]),
    ("sums: the last warp is missing", [
        (ELEMENTS, "warp < (blockDim.x + 31) / 32; warp++) total", "warp < (blockDim.x + 31) / 32 - (@ ? 1 : 0); warp++) total")]),
    ("sums: half of a warp", [(PRELUDE, "for (int step = 16; step; step >>= 1) x += __shfl", "for (int step = @ ? 8 : 16; step; step >>= 1) x += __shfl")]),
    ("maxima: no barrier before parts are overwritten", [skipped(ELEMENTS, "x = warp_max(x);\n    ", BARRIER)],
     "no kernel computes two maxima; the barrier is for those that will"),
    ("maxima: no barrier before parts are read", [
        skipped(ELEMENTS, "parts[threadIdx.x / 32] = x;\n    ", BARRIER, "\n    float largest")]),
    ("gemm: no barrier before the tiles are read", [skipped(GEMM, "col * g.b_col]) : 0.0f;\n        ", BARRIER)]),
    ("gemm: no barrier before the tiles are overwritten", [skipped(GEMM, "sum += a[y][i] * b[i][x];\n        ", BARRIER)]),
    ("gemm: the inner dimension is not limited", [(GEMM, "row < g.m && k + x < g.k ?", "row < g.m && (@ || k + x < g.k) ?")]),
    ("gemm: rows past the end written", [(GEMM, "if (row >= g.m || col >= g.n)", "if ((!@ && row >= g.m) || col >= g.n)")]),
    ("gemm: the addend is read although there is none", [(GEMM, "if (g.beta != 0.0f)", "if (@ || g.beta != 0.0f)")]),
    ("gemm: alpha ignored", [skipped(GEMM, "", "sum *= g.alpha;")]),
    ("finish: the bias of the first octet", [(GEMM, "load8(bias, a.bias + col,", "load8(bias, a.bias + (@ ? 0 : col),")]),
    ("finish: the residual is missing", [(GEMM, "if (a.residual)", "if (!@ && a.residual)")]),
    ("norms: eps is missing", [(NORMS, "(float)a.group + a.eps", "(float)a.group + (@ ? 0.0f : a.eps)")],),
    ("norms: groups past the end", [chosen(NORMS, "g < groups ? g : groups - 1", "g")]),
    ("norms: no early end of groups that do not exist", [
        (NORMS, "    if (!mine.exists) return;\n    if (lane == 0)", "    if (!@ && !mine.exists) return;\n    if (lane == 0)")]),
    ("norms: sum over half of the lanes", [chosen(NORMS, "LANES / 2", "LANES / 4")]),
    ("norms: heads of a row confused", [(NORMS, "at.remainder * a.group;\n    Y*", "(@ ? 0 : at.remainder) * a.group;\n    Y*")]),
    ("norms: the gradient without its mean", [chosen(NORMS, "v[j] * mean", "0.0f")]),
    ("norms: the mean has one factor too few", [chosen(NORMS, "group_total<LANES>(product) * inv * inv", "group_total<LANES>(product) * inv")]),
    ("norms: the gradient is not added", [(NORMS, "if (a.add) load8(sum", "if (!@ && a.add) load8(sum")]),
    ("norms: no barrier before the sums of warps are read", [skipped(NORMS, "sums[warp][j * 32 + lane] = sum[j];\n    ", BARRIER)]),
    ("norms: the last warp is missing in the weight gradient", [(NORMS, "w < 8; w++", "w < (@ ? 7u : 8u); w++")]),
    ("norms: tasks overlap", [(NORMS, "? a.groups : first + a.task_groups;", "? a.groups : first + a.task_groups + (@ ? 1 : 0);")]),
    ("normalize: no lower limit of the length", [chosen(NORMS, "fmaxf(sqrtf(block_total(sum)), 1e-12f)", "sqrtf(block_total(sum))")]),
    ("normalize: the gradient along the embedding", [chosen(NORMS, "d[j] - v[j] * along", "d[j]")]),
    ("copy: stride of the argument for the result", [(ROWS, "store8((Y*)a.y + row * a.y_stride", "store8((Y*)a.y + row * (@ ? a.x_stride : a.y_stride)")]),
    ("copy: one item too many", [(ROWS, "if (item >= a.rows * octets) return;\n    const Split at = split(item, octets);\n    const u64 row = at.quotient, col = at.remainder * OCTET;\n",
                                  "if (item >= a.rows * octets + (@ ? 1 : 0)) return;\n    const Split at = split(item, octets);\n    const u64 row = at.quotient, col = at.remainder * OCTET;\n")]),
    ("gather: rows in order", [chosen(ROWS, "(u64)a.rows[at.quotient]", "at.quotient")]),
    ("scatter: the last source is missing", [(ROWS, "for (; at < end; at++) {\n        float more[OCTET];", "for (; at + (@ ? 1 : 0) < end; at++) {\n        float more[OCTET];")]),
    ("scatter: not added to what was there", [(ROWS, "load8(sum, dx, left, a.wide);", "if (@) for (u32 j = 0; j < OCTET; j++) sum[j] = 0.0f; else load8(sum, dx, left, a.wide);")]),
    ("scatter: four sources at the end", [chosen(ROWS, "at + BATCH <= end", "at < end")]),
    ("segments: a sum instead of a mean", [(ROWS, "sum[j] *= share;", "if (!@) sum[j] *= share;")]),
    ("segments: gradients not divided", [(ROWS, "x[j] *= share;\n    for", "if (!@) x[j] *= share;\n    for")]),
    ("segments: the last row is missing", [(ROWS, "row < end; row++) store8", "row + (@ ? 1 : 0) < end; row++) store8")]),
    ("column sums: no barrier before the sums of warps are read", [skipped(ROWS, "sums[warp][j * 32 + lane] = sum[j];\n    ", BARRIER)]),
    ("column sums: rows past the end", [(ROWS, "a.rows - first < a.task_rows ? a.rows", "!@ && a.rows - first < a.task_rows ? a.rows")]),
    ("column sums: tasks past the end", [(ROWS, "if (task + i < a.tasks) sums", "if (@ || task + i < a.tasks) sums")]),
    ("column sums: added to what was there", [(ROWS, "a.sum[col] = a.add ?", "a.sum[col] = @ || a.add ?")]),
    ("rope: the first feature is overwritten before it is used", [(POINTWISE, "y[j] * c[j] + before * sine", "y[j] * c[j] + (@ ? x[j] : before) * sine")]),
    ("rope: never inverted", [(POINTWISE, "s[j] * a.direction", "s[j] * (@ ? 1.0f : a.direction)")]),
    ("rope: positions in order", [chosen(POINTWISE, "(u64)a.positions[at.quotient]", "at.quotient")]),
    ("swiglu: wrong derivative", [chosen(POINTWISE, "1.0f + gate[j] * (1.0f - s)", "1.0f + gate[j] * s")]),
    ("swiglu: gate and up confused", [(POINTWISE, "store8(gate_at + a.cols, up,", "store8(gate_at + (@ ? 0 : a.cols), up,")]),
    ("dropout: nine rounds", [(POINTWISE, "round < 10; round++", "round < (@ ? 9u : 10u); round++")]),
    ("dropout: not scaled", [(POINTWISE, "? a.keep : 0.0f", "? (@ ? 1.0f : a.keep) : 0.0f")]),
    ("dropout: words at the wrong columns", [(POINTWISE, "16 * word + lane;", "(@ ? 8 : 16) * word + lane;")]),
    ("dropout: not added", [(POINTWISE, "if (a.add) load8(y", "if (!@ && a.add) load8(y")]),
    ("cross entropy: the largest score is not subtracted", [(OBJECTIVE, "sum += expf(x[j] - largest);\n    }\n    sum = block_total(sum);\n    const u32", "sum += expf(x[j] - (@ ? 0.0f : largest));\n    }\n    sum = block_total(sum);\n    const u32")]),
    ("cross entropy: columns past the end", [(OBJECTIVE, "if (col + j < a.cols) sum += expf(x[j] - ", "if (@ || col + j < a.cols) sum += expf(x[j] - ")]),
    ("cross entropy: the target of the next column", [(OBJECTIVE, "if (col + j == target)", "if (col + j == target + (@ ? 1 : 0))")]),
    ("cross entropy: not divided by the rows", [(OBJECTIVE, "one = 1.0f / (float)a.rows", "one = @ ? 1.0f : 1.0f / (float)a.rows")]),
    ("masks: the target is masked as well", [(OBJECTIVE, "if (at != target && (at < first", "if ((@ || at != target) && (at < first")]),
    ("masks: no barrier before listed columns", [skipped(OBJECTIVE, "", BARRIER, " // the row is written")]),
    ("masks: the margin is ignored", [(OBJECTIVE, "scores[target] + a.margin", "scores[target] + (@ ? 0.0f : a.margin)")]),
    ("masks: a group that is one longer", [(OBJECTIVE, "first + a.group : a.cols", "first + a.group + (@ ? 1 : 0) : a.cols")]),
    ("distillation: the teacher's distribution is missing", [chosen(OBJECTIVE, "exp(log_q) - p", "exp(log_q)")]),
    ("distillation: sum over the first lane", [(OBJECTIVE, "log(warp_sum(sum))", "log(@ ? sum : warp_sum(sum))")]),
    ("distillation: the positive has no gradient", [(OBJECTIVE, "grad[0] += (float)of_positive", "grad[0] += @ ? 0.0f : (float)of_positive")]),
    ("distillation: the scale of margins is ignored", [(OBJECTIVE, "const double scale = (double)a.scale,", "const double scale = @ ? 1.0 : (double)a.scale,")]),
    ("set cross entropy: no barrier before the set", [skipped(OBJECTIVE, "", BARRIER, " // the gradient without the set is written")]),
    ("set cross entropy: the last row that has the maximum", [(OBJECTIVE, "if (x > largest) largest = x, place = row;", "if (x > largest || (@ && x == largest)) largest = x, place = row;")]),
    ("set cross entropy: the last row of a bag is missing", [(OBJECTIVE, "row < a.rows; row++) {\n            float x[OCTET];\n            load8(x, logits + row * a.cols + col, a.cols - col, a.wide);\n            // A NaN", "row + (@ ? 1 : 0) < a.rows; row++) {\n            float x[OCTET];\n            load8(x, logits + row * a.cols + col, a.cols - col, a.wide);\n            // A NaN")]),
    ("set cross entropy: a set that is not divided by its size", [chosen(OBJECTIVE, "(float)(end - first) * (float)a.bags", "(float)a.bags")]),
    ("set cross entropy: gradients of all rows", [(OBJECTIVE, "places[j] == row ? d[j]", "@ || places[j] == row ? d[j]")]),
    ("set cross entropy: a NaN is ignored", [(OBJECTIVE, "x[j] > m[j] || x[j] != x[j] ?", "x[j] > m[j] || (!@ && x[j] != x[j]) ?")]),
    ("gradient norm: tasks overlap", [(OBJECTIVE, "a.count - first < TASK ? a.count : first + TASK;", "a.count - first < TASK ? a.count : first + TASK + (@ ? 8 : 0);")]),
    ("gradient norm: not added to what was there", [(OBJECTIVE, "a.add ? (double)*a.out : 0.0", "!@ && a.add ? (double)*a.out : 0.0")]),
    ("clipping: gradients below the limit are enlarged", [chosen(OBJECTIVE, "factor < 1.0f ? factor : 1.0f", "factor")]),
    ("adamw: gradients are not clipped", [chosen(OBJECTIVE, "grad[j] * factor", "grad[j]")]),
    ("adamw: no weight decay", [chosen(OBJECTIVE, "value[j] * a.decay", "value[j]")]),
    ("adamw: a norm that is not finite", [(OBJECTIVE, "if (!(fabsf(norm) < INFINITY)) return;", "if (!@ && !(fabsf(norm) < INFINITY)) return;")]),
    ("adamw: the working copy is not updated", [(OBJECTIVE, "if (a.working) store8", "if (!@ && a.working) store8")]),
    ("adamw: the second moment is not squared", [chosen(OBJECTIVE, "a.one_less_beta2 * g * g", "a.one_less_beta2 * g")]),
]
