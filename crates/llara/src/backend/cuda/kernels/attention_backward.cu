// Attention, backward, with tensor cores: two passes without atomic additions, each of which recomputes the
// probabilities from the saved log-sum-exp. Seven products instead of five, but the same bits in every
// run. Run attention_delta (attention_plain.cu) first.
//
// attention_backward_queries_HD, HD in 64, 96, 128: dq.
//   grid  (numbers of tiles of 128 queries, see block_tile; heads)
//   block 128 threads
//   dynamic shared memory 768 · HD bytes (q and dout of 128 queries, twice 32 keys and values)
//   argument AttentionArgs: q, k, v, lse, dout, delta, dq, q_offsets, k_offsets, their strides, sequences,
//   query_rows, heads, kv_heads, window, scale, query_tiles.
//
// attention_backward_keys_HD, HD in 64, 96, 128: dk and dv, summed over the query heads of a group in
// ascending order. The rows of keys that no query attends to become zeros.
//   grid  (numbers of tiles of 64 keys, see block_tile; kv_heads)
//   block 128 threads
//   dynamic shared memory 512 · HD + 4608 bytes (64 keys and values, twice q and dout of 32
//   queries, the weights of a round, and twice lse and delta)
//   argument AttentionArgs: as above with dk, dv, key_rows and key_tiles instead of dq and query_tiles.
//
// Pointers to bf16 are multiples of 16 bytes, their strides multiples of 8.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;

/// Two adjacent values in shared memory, loaded by one instruction.
struct alignas(8) Floats2 {
    float x[2];
};

/// dq = scale · dS · k with dS = P∘(dP - delta), P = exp(scale · q·kᵀ - lse), dP = dout · vᵀ. The first KEPT of HD / 16
/// parts of the queries are kept in registers, the others are loaded each round.
template <int HD, int M, int KEYS, int KEPT> DEVICE void attention_backward_queries(const AttentionArgs& a) {
    constexpr int ROWS = 16 * M * WARPS; // queries of a block
    DYNAMIC_SHARED(shared);
    const Tile<HD> queries{(bf16*)shared}, douts{queries.data + ROWS * HD};
    const Tile<HD> keys{douts.data + ROWS * HD}, values{keys.data + 2 * KEYS * HD}; // two of each

    const BlockTile tile = block_tile<ROWS>(a.q_offsets, a.sequences, blockIdx.x, a.query_tiles);
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

    // What the rounds need only for loading and at the edges: in shared memory to save registers.
    __shared__ struct {
        const bf16 *k, *v;
        u32 keys, reach, sequence, lowest;
    } block;
    if (threadIdx.x == 0) {
        block.k = k, block.v = v;
        block.keys = s.keys, block.reach = attention_reach(a.window);
        block.sequence = tile.sequence, block.lowest = lowest;
    }
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
    // The queries of this warp are at the 16·M positions before its end; if it has none, no key is below the end.
    const u32 warp_end = first + row < s.queries ? lowest + row + 16 * M : 0;
    u32 kept[KEPT + 1][M][4];
    cp_async_wait<0>();
    __syncthreads(); // the queries have been loaded
    keep_left<HD, M, KEPT>(kept, left);
    u32 buffer = 0;
    for (u32 base = start; base <= highest; base += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); // the keys and values of this round have been loaded, those of the last round have been read
        if (base + KEYS <= highest) {
            const u32 other = (buffer ^ 1) * KEYS * HD;
            Tile<HD>{keys.data + other}.template fetch<KEYS, THREADS>(block.k, base + KEYS, block.keys, a.k_stride);
            Tile<HD>{values.data + other}.template fetch<KEYS, THREADS>(block.v, base + KEYS, block.keys, a.v_stride);
        }
        cp_async_commit();
        // A warp whose queries attend to no key of this round only takes part in loading.
        const u32 reach = block.reach;
        if (base >= warp_end || base + KEYS - 1 + 16 * M + reach <= warp_end) continue;

        const u32 offset = buffer * KEYS * HD * 2;
        float p[M][KEYS / 8][4] = {}, ds[M][KEYS / 8][4] = {};
        multiply_transposed<HD, M, KEYS, KEPT>(p, kept, unknown(left), unknown(right + offset));
        // Only the first and last rounds have keys that are masked for some query.
        if (base + KEYS + 16 * M - 1 > warp_end || base + reach < warp_end) {
            const u32 distance = block.lowest + row + lane / 4 - base - lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (!attends(distance + m * 16 + i / 2 * 8 - n * 8 - i % 2, reach)) p[m][n][i] = -INFINITY;
        }
        multiply_transposed<HD, M, KEYS>(ds, unknown(left_dout), unknown(right_values + offset));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ds[m][n][i] = exp2_approx(p[m][n][i] * scale - lse[m][i / 2]) * (ds[m][n][i] - delta[m][i / 2]);
        multiply<HD, M, KEYS>(dq, ds, unknown(right_keys + offset));
    }
    cp_async_wait<0>();
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = a.scale;
    const Sequence again = sequence_at(a, block.sequence);
    store_rows<HD, M>(dq, factor, queries, row, (bf16*)a.dq + (u64)again.q_begin * a.dq_stride + head * HD,
                      block.lowest - again.first_position(), again.queries, a.dq_stride);
}

/// dv = Pᵀ · dout and dk = scale · dSᵀ · q. The scores are computed transposed, keys by queries, so that the
/// accumulators of Pᵀ and dSᵀ are the left operands of the products that follow.
///
/// Two warps share 16·M keys, so that each needs registers for one of the two sums only: the first warp computes
/// Pᵀ and dv, the second dPᵀ, dSᵀ and dk. The first passes Pᵀ to the second through shared memory, rounded to bf16 as
/// it is for dv. The first KEPT of HD / 16 parts of the keys or values are kept in registers, the others are loaded
/// each round.
template <int HD, int M, int QUERIES, int KEPT> DEVICE void attention_backward_keys(const AttentionArgs& a) {
    constexpr int ROWS = 16 * M * WARPS / 2; // keys of a block
    constexpr int PARTS = QUERIES / 16 * M; // of 16 bytes, of the weights of a lane
    DYNAMIC_SHARED(shared);
    const Tile<HD> keys{(bf16*)shared}, values{keys.data + ROWS * HD};
    const Tile<HD> queries{values.data + ROWS * HD}, douts{queries.data + 2 * QUERIES * HD}; // two of each
    Bytes16* const all_weights = (Bytes16*)(douts.data + 2 * QUERIES * HD); // [pairs of warps, PARTS, lanes]
    float* const lses = (float*)(all_weights + WARPS / 2 * PARTS * 32);
    float* const deltas = lses + 2 * QUERIES;

    const BlockTile tile = block_tile<ROWS>(a.k_offsets, a.sequences, blockIdx.x, a.key_tiles);
    if (!tile.exists) return;
    const Sequence s = sequence_at(a, tile.sequence);
    const u32 first = tile.first; // ascending: the most queries attend to the first keys
    const int lane = threadIdx.x % 32, pair = (int)threadIdx.x / 64, row = pair * 16 * M;
    const bool is_second = threadIdx.x / 32 % 2;
    const u32 kv_head = blockIdx.y, group = a.heads / a.kv_heads;

    keys.template fetch<ROWS, THREADS>((const bf16*)a.k + (u64)s.k_begin * a.k_stride + kv_head * HD, first,
                                       s.keys, a.k_stride);
    values.template fetch<ROWS, THREADS>((const bf16*)a.v + (u64)s.k_begin * a.v_stride + kv_head * HD, first,
                                         s.keys, a.v_stride);

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

    // What the rounds need only for loading, and the end of the kernel: in shared memory to save registers.
    __shared__ struct {
        const bf16 *q, *dout;
        const float *lse, *delta;
        u32 end, sequence;
    } block;
    if (threadIdx.x == 0) {
        block.q = (const bf16*)a.q + (u64)s.q_begin * a.q_stride;
        block.dout = (const bf16*)a.dout + (u64)s.q_begin * a.dout_stride;
        block.lse = a.lse + s.q_begin, block.delta = a.delta + s.q_begin;
        block.end = end, block.sequence = tile.sequence;
    }
    __syncthreads(); // it has been written
    auto prefetch = [&](u32 head, u32 query, u32 buffer) {
        const u32 end = block.end;
        const Tile<HD> q_tile{queries.data + buffer * QUERIES * HD}, dout_tile{douts.data + buffer * QUERIES * HD};
        q_tile.template fetch<QUERIES, THREADS>(block.q + head * HD, query, end, a.q_stride);
        dout_tile.template fetch<QUERIES, THREADS>(block.dout + head * HD, query, end, a.dout_stride);
        // Rows past the end become zeros in q, dout, lse and delta, and so add nothing to dk and dv.
        if (threadIdx.x < 2 * QUERIES) {
            const u32 i = threadIdx.x % QUERIES;
            const u64 at = (u64)head * a.query_rows + query + i;
            const bool is_lse = threadIdx.x < QUERIES;
            cp_async4(shared_address((is_lse ? lses : deltas) + buffer * QUERIES + i),
                      (is_lse ? block.lse : block.delta) + at, query + i < end);
        }
    };

    float sums[M][HD / 8][4] = {}; // dv or dk
    const float scale = a.scale * LOG2_E;
    // The first warp of a pair multiplies keys by queries and weights by dout, the second values by dout and dS by
    // queries.
    const Tile<HD> own = is_second ? values : keys;
    const SharedAddress left = left_address(own, row);
    const SharedAddress right = transposed_address(is_second ? douts : queries);
    const SharedAddress right_sums = left_address(is_second ? queries : douts, 0);
    Bytes16* const weights = all_weights + pair * PARTS * 32 + lane;
    const float* const saved = (is_second ? deltas : lses) + lane % 4 * 2;
    u32 head = kv_head * group, query = start;
    if (rounds) prefetch(head, query, 0);
    cp_async_commit();
    u32 kept[KEPT + 1][M][4];
    cp_async_wait<0>();
    __syncthreads(); // the keys and values have been loaded
    keep_left<HD, M, KEPT>(kept, left);
    for (u32 round = 0; round < rounds; round++) {
        const u32 buffer = round % 2;
        cp_async_wait<0>();
        __syncthreads(); // the queries of this round have been loaded, those of the last round have been read
        const u32 lowest = s.first_position() + query;
        query += QUERIES;
        if (query >= end) query = start, head++;
        if (round + 1 < rounds) prefetch(head, query, buffer ^ 1);
        cp_async_commit();

        // A warp to whose keys no query of this round attends only takes part in loading.
        const u32 warp_first = first + row, reach = attention_reach(a.window), offset = buffer * QUERIES * HD * 2;
        const bool active = warp_first < s.keys && lowest + QUERIES > warp_first &&
                            lowest < warp_first + 16 * M - 1 + reach;
        float x[M][QUERIES / 8][4];
        u32 packed[QUERIES / 16][M][4];
        if (active) {
            clear(x);
            multiply_transposed<HD, M, QUERIES, KEPT>(x, kept, unknown(left), unknown(right + offset));
        }
        if (active && !is_second) {
            if (warp_first + 16 * M - 1 > lowest || lowest + QUERIES - 1 >= warp_first + reach) {
                const u32 distance = lowest + lane % 4 * 2 - warp_first - lane / 4;
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (!attends(distance + n * 8 + i % 2 - m * 16 - i / 2 * 8, reach)) x[m][n][i] = -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const Floats2 lse = *(const Floats2*)(saved + buffer * QUERIES + n * 8);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) x[m][n][i] = exp2_approx(x[m][n][i] * scale - lse.x[i % 2] * LOG2_E);
            }
            pack_left<M, QUERIES>(packed, x);
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const u32(&from)[4] = packed[i / M][i % M];
                store16(weights + i * 32, Bytes16{from[0], from[1], from[2], from[3]});
            }
        }
        __syncthreads(); // the weights have been written
        if (!active) continue;
        if (is_second) {
            // x[m][n][2·h], x[m][n][2·h + 1] belong to packed[n / 2][m][n % 2 · 2 + h].
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const Bytes16 w = load16(weights + i * 32);
                u32(&to)[4] = packed[i / M][i % M];
                to[0] = w.x, to[1] = w.y, to[2] = w.z, to[3] = w.w;
            }
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const Floats2 delta = *(const Floats2*)(saved + buffer * QUERIES + n * 8);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        u32& w = packed[n / 2][m][n % 2 * 2 + h];
                        w = pack_bf16(bf16_low(w) * (x[m][n][2 * h] - delta.x[0]),
                                      bf16_high(w) * (x[m][n][2 * h + 1] - delta.x[1]));
                    }
            }
        }
        multiply<HD, M, QUERIES>(sums, packed, unknown(right_sums + offset));
    }
    cp_async_wait<0>();
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = is_second ? a.scale : 1.0f;
    // Only this warp reads these rows of its left operand.
    const Sequence again = sequence_at(a, block.sequence);
    const u32 stride = is_second ? a.dk_stride : a.dv_stride;
    bf16* const to = (bf16*)(is_second ? a.dk : a.dv) + (u64)again.k_begin * stride + kv_head * HD;
    store_rows<HD, M>(sums, factor, own, row, to, first, again.keys, stride);
}

KERNEL(THREADS, 2) attention_backward_queries_64(AttentionArgs a) { attention_backward_queries<64, 2, 32, 4>(a); }
KERNEL(THREADS, 2) attention_backward_queries_96(AttentionArgs a) { attention_backward_queries<96, 2, 32, 1>(a); }
KERNEL(THREADS, 2) attention_backward_queries_128(AttentionArgs a) { attention_backward_queries<128, 2, 32, 0>(a); }
KERNEL(THREADS, 2) attention_backward_keys_64(AttentionArgs a) { attention_backward_keys<64, 2, 32, 4>(a); }
KERNEL(THREADS, 2) attention_backward_keys_96(AttentionArgs a) { attention_backward_keys<96, 2, 32, 3>(a); }
KERNEL(THREADS, 2) attention_backward_keys_128(AttentionArgs a) { attention_backward_keys<128, 2, 32, 1>(a); }
