// Attention, backward, with tensor cores: two passes without atomic additions, each of which recomputes the
// probabilities from the saved log-sum-exp. Seven products instead of five, but the same bits in every
// run. Run attention_delta (attention_plain.cu) first.
//
// attention_backward_queries_HD, HD in 64, 96, 128: dq.
//   grid  (query_rows / 128 + sequences, heads), integer division
//   block 128 threads
//   dynamic shared memory 768 · HD bytes (q and dout of 128 queries, twice 32 keys and values)
//   argument AttentionArgs: q, k, v, lse, dout, delta, dq, q_offsets, k_offsets, their strides, sequences,
//   query_rows, heads, kv_heads, window, scale.
//
// attention_backward_keys_HD, HD in 64, 96, 128: dk and dv, summed over the query heads of a group in
// ascending order. The rows of keys that no query attends to become zeros.
//   grid  (key_rows / KEYS + sequences, kv_heads), integer division; KEYS is 128 for HD 64, else 64
//   block 128 threads
//   dynamic shared memory 4 · (KEYS + 64) · HD + 512 bytes (keys, values, twice q and dout of 32 queries,
//   with their lse and delta)
//   argument AttentionArgs: as above with dk, dv instead of dq, and key_rows.
//
// Pointers to bf16 are multiples of 16 bytes, their strides multiples of 8.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;

/// dq = scale · dS · k with dS = P∘(dP - delta), P = exp(scale · q·kᵀ - lse), dP = dout · vᵀ.
template <int HD, int M, int KEYS> DEVICE void attention_backward_queries(const AttentionArgs& a) {
    constexpr int ROWS = 16 * M * WARPS; // queries of a block
    DYNAMIC_SHARED(shared);
    const Tile<HD> queries{(bf16*)shared}, douts{queries.data + ROWS * HD};
    const Tile<HD> keys{douts.data + ROWS * HD}, values{keys.data + 2 * KEYS * HD}; // two of each

    const BlockTile tile = block_tile<ROWS>(a.q_offsets, a.sequences, blockIdx.x);
    if (!tile.exists) return;
    const Sequence s = sequence_at(a, tile.sequence);
    const u32 first = (s.queries - 1) / ROWS * ROWS - tile.first; // the longest work first
    const int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 * 16 * M;
    const u32 head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
    const bf16* k = (const bf16*)a.k + (u64)s.k_begin * a.k_stride + kv_head * HD;
    const bf16* v = (const bf16*)a.v + (u64)s.k_begin * a.v_stride + kv_head * HD;

    const u32 end = first + ROWS < s.queries ? first + ROWS : s.queries;
    const u32 lowest = s.first_position() + first, highest = s.first_position() + end - 1;
    const u32 start = a.window && lowest + 1 > a.window ? (lowest + 1 - a.window) / KEYS * KEYS : 0;

    const bf16* q = (const bf16*)a.q + (u64)s.q_begin * a.q_stride + head * HD;
    const bf16* dout = (const bf16*)a.dout + (u64)s.q_begin * a.dout_stride + head * HD;
    queries.template fetch<ROWS, THREADS>(q, first, s.queries, a.q_stride);
    douts.template fetch<ROWS, THREADS>(dout, first, s.queries, a.dout_stride);
    keys.template fetch<KEYS, THREADS>(k, start, s.keys, a.k_stride);
    values.template fetch<KEYS, THREADS>(v, start, s.keys, a.v_stride);
    cp_async_commit();

    float lse[M][2], delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 at = first + row + m * 16 + h * 8 + lane / 4;
            const u64 i = (u64)head * a.query_rows + s.q_begin + at;
            lse[m][h] = at < s.queries ? a.lse[i] * LOG2_E : 0.0f;
            delta[m][h] = at < s.queries ? a.delta[i] : 0.0f;
        }

    float dq[M][HD / 8][4] = {};
    const float scale = a.scale * LOG2_E;
    const SharedAddress left = left_address(queries, row), left_dout = left_address(douts, row);
    const SharedAddress right = transposed_address(keys), right_values = transposed_address(values);
    const SharedAddress right_keys = left_address(keys, 0);
    // The positions of the queries of this warp; if it has none, no key is below the end.
    const u32 warp_first = lowest + row;
    const u32 warp_end = first + row < s.queries ? warp_first + 16 * M : 0;
    u32 buffer = 0;
    for (u32 base = start; base <= highest; base += KEYS, buffer ^= 1) {
        if (base + KEYS <= highest) {
            const u32 other = (buffer ^ 1) * KEYS * HD;
            Tile<HD>{keys.data + other}.template fetch<KEYS, THREADS>(k, base + KEYS, s.keys, a.k_stride);
            Tile<HD>{values.data + other}.template fetch<KEYS, THREADS>(v, base + KEYS, s.keys, a.v_stride);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads(); // the keys and values of this round have been loaded

        // A warp whose queries attend to no key of this round only takes part in loading.
        const bool active = base < warp_end && !(a.window && base + KEYS - 1 + a.window <= warp_first);
        if (active) {
            const u32 offset = buffer * KEYS * HD * 2;
            float p[M][KEYS / 8][4] = {}, ds[M][KEYS / 8][4] = {};
            multiply_transposed<HD, M, KEYS>(p, left, right + offset);
            multiply_transposed<HD, M, KEYS>(ds, left_dout, right_values + offset);
            const bool edge = base + KEYS > lowest + 1 || (a.window && base + a.window <= highest);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float w = exp2_approx(p[m][n][i] * scale - lse[m][i / 2]);
                        if (edge) {
                            const u32 key = base + n * 8 + lane % 4 * 2 + i % 2;
                            const u32 position = lowest + row + m * 16 + lane / 4 + i / 2 * 8;
                            if (key > position || (a.window && key + a.window <= position)) w = 0.0f;
                        }
                        ds[m][n][i] = w * (ds[m][n][i] - delta[m][i / 2]);
                    }
            multiply<HD, M, KEYS>(dq, ds, right_keys + offset);
        }
        __syncthreads(); // they have been read
    }
    cp_async_wait<0>();
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows<HD, M>(dq, factor, queries, row, (bf16*)a.dq + (u64)s.q_begin * a.dq_stride + head * HD, first,
                      s.queries, a.dq_stride);
}

/// dv = Pᵀ · dout and dk = scale · dSᵀ · q. The scores are computed transposed, keys by queries, so that the
/// accumulators of Pᵀ and dSᵀ are the left operands of the products that follow.
template <int HD, int M, int QUERIES> DEVICE void attention_backward_keys(const AttentionArgs& a) {
    constexpr int ROWS = 16 * M * WARPS; // keys of a block
    // With 16 rows per warp, registers hold keys and values as left operands; with 32, they are loaded each round.
    constexpr bool KEEP = M == 1;
    DYNAMIC_SHARED(shared);
    const Tile<HD> keys{(bf16*)shared}, values{keys.data + ROWS * HD};
    const Tile<HD> queries{values.data + ROWS * HD}, douts{queries.data + 2 * QUERIES * HD}; // two of each
    float* const lses = (float*)(douts.data + 2 * QUERIES * HD);
    float* const deltas = lses + 2 * QUERIES;

    const BlockTile tile = block_tile<ROWS>(a.k_offsets, a.sequences, blockIdx.x);
    if (!tile.exists) return;
    const Sequence s = sequence_at(a, tile.sequence);
    const u32 first = tile.first; // ascending: the most queries attend to the first keys
    const int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 * 16 * M;
    const u32 kv_head = blockIdx.y, group = a.heads / a.kv_heads;

    keys.template fetch<ROWS, THREADS>((const bf16*)a.k + (u64)s.k_begin * a.k_stride + kv_head * HD, first,
                                       s.keys, a.k_stride);
    values.template fetch<ROWS, THREADS>((const bf16*)a.v + (u64)s.k_begin * a.v_stride + kv_head * HD, first,
                                         s.keys, a.v_stride);
    cp_async_commit();

    // The queries that attend to any key of this block.
    const u32 last = (first + ROWS < s.keys ? first + ROWS : s.keys) - 1;
    const u32 start = first > s.first_position() ? first - s.first_position() : 0;
    u32 end = s.queries;
    if (a.window) {
        const u32 beyond = last + a.window; // the first position that does not attend to the last key
        const u32 seeing = beyond > s.first_position() ? beyond - s.first_position() : 0;
        end = seeing < end ? seeing : end;
    }
    const u32 rounds_per_head = end > start ? (end - start + QUERIES - 1) / QUERIES : 0;
    const u32 rounds = rounds_per_head * group;

    auto prefetch = [&](u32 head, u32 query, u32 buffer) {
        const Tile<HD> q_tile{queries.data + buffer * QUERIES * HD}, dout_tile{douts.data + buffer * QUERIES * HD};
        q_tile.template fetch<QUERIES, THREADS>((const bf16*)a.q + (u64)s.q_begin * a.q_stride + head * HD, query,
                                                end, a.q_stride);
        dout_tile.template fetch<QUERIES, THREADS>(
            (const bf16*)a.dout + (u64)s.q_begin * a.dout_stride + head * HD, query, end, a.dout_stride);
        // Rows past the end become zeros in q, dout, lse and delta, and so add nothing to dk and dv.
        const u64 saved = (u64)head * a.query_rows + s.q_begin;
        const u32 i = threadIdx.x % QUERIES;
        const bool valid = query + i < end;
        const u64 at = valid ? saved + query + i : saved;
        if (threadIdx.x < QUERIES) cp_async4(lses + buffer * QUERIES + i, a.lse + at, valid);
        else if (threadIdx.x < 2 * QUERIES) cp_async4(deltas + buffer * QUERIES + i, a.delta + at, valid);
    };

    float dk[M][HD / 8][4] = {}, dv[M][HD / 8][4] = {};
    const float scale = a.scale * LOG2_E;
    const SharedAddress left = left_address(keys, row), left_values = left_address(values, row);
    const SharedAddress right = transposed_address(queries), right_dout = transposed_address(douts);
    const SharedAddress right_queries = left_address(queries, 0), right_douts = left_address(douts, 0);
    u32 head = kv_head * group, query = start;
    if (rounds) prefetch(head, query, 0);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads(); // the keys and values have been loaded
    u32 kept[KEEP ? HD / 16 : 1][M][4], kept_values[KEEP ? HD / 16 : 1][M][4];
    if (KEEP)
#pragma unroll
        for (int c = 0; c < HD / 16; c++) {
            load_left<HD, M>(kept[KEEP ? c : 0], left, c);
            load_left<HD, M>(kept_values[KEEP ? c : 0], left_values, c);
        }
    for (u32 round = 0; round < rounds; round++) {
        const u32 buffer = round % 2;
        const u32 this_query = query;
        query += QUERIES;
        if (query >= end) query = start, head++;
        if (round + 1 < rounds) prefetch(head, query, buffer ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads(); // the queries of this round have been loaded

        // A warp to whose keys no query of this round attends only takes part in loading.
        const u32 lowest = s.first_position() + this_query, warp_first = first + row;
        const bool active = warp_first < s.keys && lowest + QUERIES > warp_first &&
                            !(a.window && warp_first + 16 * M - 1 + a.window <= lowest);
        if (active) {
            const u32 offset = buffer * QUERIES * HD * 2;
            float p[M][QUERIES / 8][4] = {}, ds[M][QUERIES / 8][4] = {};
            if (KEEP) {
#pragma unroll
                for (int c = 0; c < HD / 16; c++) {
                    multiply_transposed<HD, M, QUERIES>(p, kept[KEEP ? c : 0], right + offset, c);
                    multiply_transposed<HD, M, QUERIES>(ds, kept_values[KEEP ? c : 0], right_dout + offset, c);
                }
            } else {
                multiply_transposed<HD, M, QUERIES>(p, left, right + offset);
                multiply_transposed<HD, M, QUERIES>(ds, left_values, right_dout + offset);
            }
            const bool edge = first + ROWS > lowest + 1 || (a.window && first + a.window <= lowest + QUERIES - 1);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 at = n * 8 + lane % 4 * 2 + j;
                    const float lse = lses[buffer * QUERIES + at] * LOG2_E, delta = deltas[buffer * QUERIES + at];
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int i = j; i < 4; i += 2) {
                            float w = exp2_approx(p[m][n][i] * scale - lse);
                            if (edge) {
                                const u32 key = first + row + m * 16 + lane / 4 + i / 2 * 8, position = lowest + at;
                                if (key > position || (a.window && key + a.window <= position)) w = 0.0f;
                            }
                            p[m][n][i] = w;
                            ds[m][n][i] = w * (ds[m][n][i] - delta);
                        }
                }
            multiply<HD, M, QUERIES>(dv, p, right_douts + offset);
            multiply<HD, M, QUERIES>(dk, ds, right_queries + offset);
        }
        __syncthreads(); // they have been read
    }
    cp_async_wait<0>();
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows<HD, M>(dk, factor, keys, row, (bf16*)a.dk + (u64)s.k_begin * a.dk_stride + kv_head * HD, first,
                      s.keys, a.dk_stride);
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = 1.0f;
    store_rows<HD, M>(dv, factor, values, row, (bf16*)a.dv + (u64)s.k_begin * a.dv_stride + kv_head * HD, first,
                      s.keys, a.dv_stride);
}

KERNEL(THREADS, 2) attention_backward_queries_64(AttentionArgs a) { attention_backward_queries<64, 2, 32>(a); }
KERNEL(THREADS, 2) attention_backward_queries_96(AttentionArgs a) { attention_backward_queries<96, 2, 32>(a); }
KERNEL(THREADS, 2) attention_backward_queries_128(AttentionArgs a) { attention_backward_queries<128, 2, 32>(a); }
KERNEL(THREADS, 2) attention_backward_keys_64(AttentionArgs a) { attention_backward_keys<64, 2, 32>(a); }
KERNEL(THREADS, 2) attention_backward_keys_96(AttentionArgs a) { attention_backward_keys<96, 1, 32>(a); }
KERNEL(THREADS, 2) attention_backward_keys_128(AttentionArgs a) { attention_backward_keys<128, 1, 32>(a); }
