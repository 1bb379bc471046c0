// Attention, forward, with tensor cores: bf16 in and out, sums in f32, online softmax (Dao 2023). Each warp has
// 32 queries, so that each fragment of keys or values that it loads is used in two products.
//
// attention_forward_HD, HD in 64, 96, 128:
//   grid  (numbers of tiles of 128 queries, see block_tile; heads)
//   block 128 threads
//   dynamic shared memory 512 · HD bytes (128 queries, 64 keys, 64 values)
//   argument AttentionArgs: q, k, v, out, lse, q_offsets, k_offsets, their strides, sequences, query_rows,
//   heads, kv_heads, window, scale > 0, query_tiles. Pointers are multiples of 16 bytes, strides multiples of 8.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int M = 2;                 // blocks of 16 rows that a warp has
constexpr int ROWS = 16 * M * WARPS; // queries of a block
constexpr int KEYS = 64;             // keys of a round
/// The exponents of a row are relative to its largest score, which is updated only when a score is larger by more
/// than this power of two: most rounds then need not multiply the old output. No exponential exceeds 2^SLACK.
constexpr float SLACK = 8.0f;
constexpr float NO_SCORE = -1e38f; // less than any score

/// The first KEPT of HD / 16 parts of the queries are kept in registers, the others are loaded each round.
template <int HD, int KEPT> DEVICE void attention_forward(const AttentionArgs& a) {
    DYNAMIC_SHARED(shared);
    const Tile<HD> queries{(bf16*)shared}, keys{queries.data + ROWS * HD}, values{keys.data + KEYS * HD};

    const BlockTile tile = block_tile<ROWS>(a.q_offsets, a.sequences, blockIdx.x, a.query_tiles);
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

    // What the rounds need only for loading, and the end of the kernel: in shared memory to save registers.
    __shared__ struct {
        const bf16 *k, *v;
        u32 keys, reach, sequence, lowest;
    } block;
    if (threadIdx.x == 0) {
        block.k = k, block.v = v;
        block.keys = s.keys, block.reach = attention_reach(a.window);
        block.sequence = tile.sequence, block.lowest = lowest;
    }

    float o[M][HD / 8][4] = {};
    const float scale = a.scale * LOG2_E;
    // Of each row: log2 of the factor by which its exponentials are too large, and this lane's part of their sum.
    float shift[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) shift[m][0] = shift[m][1] = NO_SCORE, sum[m][0] = sum[m][1] = 0.0f;
    u32 kept[KEPT + 1][M][4];

    const SharedAddress left = left_address(queries, row);
    const SharedAddress right = transposed_address(keys), right_values = left_address(values, 0);
    // The queries of this warp are at the 16·M positions before its end; if it has none, no key is below the end.
    const u32 warp_end = first + row < s.queries ? lowest + row + 16 * M : 0;
    cp_async_wait<0>();
    __syncthreads(); // the queries have been loaded
    keep_left<HD, M, KEPT>(kept, left);
    for (u32 base = start; base <= highest; base += KEYS) {
        cp_async_wait<0>();
        __syncthreads(); // the keys have been loaded, the values of the last round have been read
        values.template fetch<KEYS, THREADS>(block.v, base, block.keys, a.v_stride);
        cp_async_commit();

        // A warp whose queries attend to no key of this round only takes part in loading.
        const u32 reach = block.reach;
        const bool active = base < warp_end && base + KEYS - 1 + 16 * M + reach > warp_end;
        float score[M][KEYS / 8][4];
        if (active) {
            clear(score);
            multiply_transposed<HD, M, KEYS, KEPT>(score, kept, unknown(left), unknown(right));
        }
        cp_async_wait<0>();
        __syncthreads(); // the values have been loaded, the keys have been read
        if (base + KEYS <= highest) keys.template fetch<KEYS, THREADS>(block.k, base + KEYS, block.keys, a.k_stride);
        cp_async_commit();
        if (active) {
            // Only the first and last rounds have keys that are masked for some query.
            if (base + KEYS + 16 * M - 1 > warp_end || base + reach < warp_end) {
                const u32 distance = block.lowest + row + lane / 4 - base - lane % 4 * 2;
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (!attends(distance + m * 16 + i / 2 * 8 - n * 8 - i % 2, reach))
                                score[m][n][i] = -INFINITY;
            }
            float larger[M][2];
            bool grows = false;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float top = fmaxf(score[m][0][2 * h], score[m][0][2 * h + 1]);
#pragma unroll
                    for (int n = 1; n < KEYS / 8; n++)
                        top = fmaxf(top, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2)) * scale;
                    larger[m][h] = top > shift[m][h] + SLACK ? top : shift[m][h];
                    grows |= larger[m][h] != shift[m][h];
                }
            if (__any_sync(FULL_WARP, grows)) { // rows that do not grow are multiplied by 1
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float shrink = exp2_approx(shift[m][h] - larger[m][h]);
                        shift[m][h] = larger[m][h];
                        sum[m][h] *= shrink;
#pragma unroll
                        for (int n = 0; n < HD / 8; n++) o[m][n][2 * h] *= shrink, o[m][n][2 * h + 1] *= shrink;
                    }
            }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        score[m][n][i] = exp2_approx(score[m][n][i] * scale - shift[m][i / 2]);
                        sum[m][i / 2] += score[m][n][i];
                    }
            multiply<HD, M, KEYS>(o, score, right_values);
        }
    }
    cp_async_wait<0>();

    const Sequence again = sequence_at(a, block.sequence);
    const u32 begin = block.lowest - again.first_position();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(FULL_WARP, total, 1);
            total += __shfl_xor_sync(FULL_WARP, total, 2);
            const u32 at = begin + row + m * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && at < again.queries)
                a.lse[(u64)head * a.query_rows + again.q_begin + at] = (shift[m][h] + log2_approx(total)) / LOG2_E;
            sum[m][h] = 1.0f / total;
        }
    // Each warp reads only its own rows of the queries, and may overwrite them.
    store_rows<HD, M>(o, sum, queries, row, (bf16*)a.out + (u64)again.q_begin * a.out_stride + head * HD, begin,
                      again.queries, a.out_stride);
}

KERNEL(THREADS, 2) attention_forward_64(AttentionArgs a) { attention_forward<64, 4>(a); }
KERNEL(THREADS, 2) attention_forward_96(AttentionArgs a) { attention_forward<96, 2>(a); }
KERNEL(THREADS, 2) attention_forward_128(AttentionArgs a) { attention_forward<128, 1>(a); }
