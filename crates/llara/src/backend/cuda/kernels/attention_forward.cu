// Attention, forward, with tensor cores: bf16 in and out, sums in f32, online softmax (Dao 2023). Each warp has
// 32 queries, so that each fragment of keys or values that it loads is used in two products.
//
// attention_forward_HD, HD in 64, 96, 128:
//   grid  (query_rows / 128 + sequences, heads), integer division
//   block 128 threads
//   dynamic shared memory 512 · HD bytes (128 queries, 64 keys, 64 values)
//   argument AttentionArgs: q, k, v, out, lse, q_offsets, k_offsets, their strides, sequences, query_rows,
//   heads, kv_heads, window, scale > 0. Pointers are multiples of 16 bytes, strides multiples of 8.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int M = 2;                // blocks of 16 rows that a warp has
constexpr int ROWS = 16 * M * WARPS; // queries of a block
constexpr int KEYS = 64;            // keys of a round

template <int HD> DEVICE void attention_forward(const AttentionArgs& a) {
    DYNAMIC_SHARED(shared);
    const Tile<HD> queries{(bf16*)shared}, keys{queries.data + ROWS * HD}, values{keys.data + KEYS * HD};
    // The left operand, the queries, is loaded once if there are enough registers, else in each round.
    constexpr bool KEEP_QUERIES = HD == 64;

    const BlockTile tile = block_tile<ROWS>(a.q_offsets, a.sequences, blockIdx.x);
    if (!tile.exists) return;
    const Sequence s = sequence_at(a, tile.sequence);
    // Within a sequence, the last tiles first: they attend to the most keys.
    const u32 first = (s.queries - 1) / ROWS * ROWS - tile.first;
    const int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 * 16 * M; // of the tile, the warp's first
    const u32 head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
    const bf16* q = (const bf16*)a.q + (u64)s.q_begin * a.q_stride + head * HD;
    const bf16* k = (const bf16*)a.k + (u64)s.k_begin * a.k_stride + kv_head * HD;
    const bf16* v = (const bf16*)a.v + (u64)s.k_begin * a.v_stride + kv_head * HD;

    // Positions of the first and last query, and the keys that any of them attends to, from a multiple of KEYS on.
    const u32 end = first + ROWS < s.queries ? first + ROWS : s.queries;
    const u32 lowest = s.first_position() + first, highest = s.first_position() + end - 1;
    const u32 start = a.window && lowest + 1 > a.window ? (lowest + 1 - a.window) / KEYS * KEYS : 0;

    queries.template fetch<ROWS, THREADS>(q, first, s.queries, a.q_stride);
    keys.template fetch<KEYS, THREADS>(k, start, s.keys, a.k_stride);
    cp_async_commit();

    float o[M][HD / 8][4] = {};
    float top[M][2], sum[M][2]; // of each row: largest score so far, and this lane's part of Σ exp(score - top)
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
    u32 kept[KEEP_QUERIES ? HD / 16 : 1][M][4];
    const float scale = a.scale * LOG2_E;

    const SharedAddress left = left_address(queries, row);
    const SharedAddress right = transposed_address(keys), right_values = left_address(values, 0);
    // The positions of the queries of this warp; if it has none, no key is below the end.
    const u32 warp_first = lowest + row;
    const u32 warp_end = first + row < s.queries ? warp_first + 16 * M : 0;
    for (u32 base = start; base <= highest; base += KEYS) {
        // A warp whose queries attend to no key of this round only takes part in loading.
        const bool active = base < warp_end && !(a.window && base + KEYS - 1 + a.window <= warp_first);
        cp_async_wait<0>();
        __syncthreads(); // the keys have been loaded, the values of the last round have been read
        values.template fetch<KEYS, THREADS>(v, base, s.keys, a.v_stride);
        cp_async_commit();

        if (KEEP_QUERIES && base == start)
#pragma unroll
            for (int c = 0; c < HD / 16; c++) load_left<HD, M>(kept[KEEP_QUERIES ? c : 0], left, c);
        float score[M][KEYS / 8][4] = {};
        if (active) {
            if (KEEP_QUERIES) {
#pragma unroll
                for (int c = 0; c < HD / 16; c++)
                    multiply_transposed<HD, M, KEYS>(score, kept[KEEP_QUERIES ? c : 0], right, c);
            } else {
                multiply_transposed<HD, M, KEYS>(score, left, right);
            }
        }

        cp_async_wait<0>();
        __syncthreads(); // the values have been loaded, the keys have been read
        if (base + KEYS <= highest) keys.template fetch<KEYS, THREADS>(k, base + KEYS, s.keys, a.k_stride);
        cp_async_commit();
        if (!active) continue;

        // Only the first and last rounds have keys that are masked for some query.
        if (base + KEYS > lowest + 1 || (a.window && base + a.window <= highest)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u32 key = base + n * 8 + lane % 4 * 2 + i % 2;
                        const u32 position = lowest + row + m * 16 + lane / 4 + i / 2 * 8;
                        if (key > position || (a.window && key + a.window <= position))
                            score[m][n][i] = -INFINITY;
                    }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float larger = top[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    larger = fmaxf(larger, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 1));
                larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 2));
                // With a window, all keys of a row so far may be masked: -inf - -inf would be NaN.
                const float shift = larger == -INFINITY ? 0.0f : larger * scale;
                const float shrink = exp2_approx(top[m][h] * scale - shift);
                float part = 0.0f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; i++) {
                        score[m][n][i] = exp2_approx(score[m][n][i] * scale - shift);
                        part += score[m][n][i];
                    }
                top[m][h] = larger;
                sum[m][h] = sum[m][h] * shrink + part;
#pragma unroll
                for (int n = 0; n < HD / 8; n++) o[m][n][2 * h] *= shrink, o[m][n][2 * h + 1] *= shrink;
            }
        multiply<HD, M, KEYS>(o, score, right_values);
    }
    cp_async_wait<0>();

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(FULL_WARP, total, 1);
            total += __shfl_xor_sync(FULL_WARP, total, 2);
            const u32 at = first + row + m * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && at < s.queries)
                a.lse[(u64)head * a.query_rows + s.q_begin + at] = top[m][h] * a.scale + logf(total);
            sum[m][h] = 1.0f / total;
        }
    // Each warp reads only its own rows of the queries, and may overwrite them.
    store_rows<HD, M>(o, sum, queries, row, (bf16*)a.out + (u64)s.q_begin * a.out_stride + head * HD, first,
                      s.queries, a.out_stride);
}

KERNEL(THREADS, 2) attention_forward_64(AttentionArgs a) { attention_forward<64>(a); }
KERNEL(THREADS, 2) attention_forward_96(AttentionArgs a) { attention_forward<96>(a); }
KERNEL(THREADS, 2) attention_forward_128(AttentionArgs a) { attention_forward<128>(a); }
