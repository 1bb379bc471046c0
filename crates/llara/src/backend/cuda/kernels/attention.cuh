// Shared code of the attention kernels: arguments, the rows of a block, tiles in shared memory, and
// products of a warp with a tile.
//
// Attention is causal, over sequences packed one after another. The rows of q (and out, dout, dq) are the
// last rows of each sequence of k and v: row i of the n queries of a sequence with m keys is at position
// m - n + i. A query at position p attends to keys j with p - window < j <= p. Query head h uses key head
// h / (heads / kv_heads).
#pragma once
#include "prelude.cuh"

/// Arguments of every attention kernel. Pointers are to the first element of a view; strides are in
/// elements from one row to the next. A kernel reads only the fields of its pass.
struct AttentionArgs {
    const void* q;    // [query rows, heads · head_dim]
    const void* k;    // [key rows, kv_heads · head_dim]
    const void* v;    // [key rows, kv_heads · head_dim]
    void* out;        // [query rows, heads · head_dim]; written by the forward pass
    float* lse;       // [heads, query rows]: log Σ exp(scale · q·k), written by the forward pass
    const void* dout; // [query rows, heads · head_dim]
    float* delta;     // [heads, query rows]: Σ dout∘out, written by attention_delta
    void* dq;         // shaped like q, k and v
    void* dk;
    void* dv;
    const u32* q_offsets; // [sequences + 1]: rows q_offsets[s]..q_offsets[s + 1] are the queries of sequence s
    const u32* k_offsets; // [sequences + 1]: the same for the keys
    u32 q_stride;
    u32 k_stride;
    u32 v_stride;
    u32 out_stride;
    u32 dout_stride;
    u32 dq_stride;
    u32 dk_stride;
    u32 dv_stride;
    u32 sequences;
    u32 query_rows;
    u32 key_rows;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 window; // 0: no window; at most 2^31
    float scale;
    u32 query_tiles; // tiles of the queries of every sequence, see block_tile; 0: search
    u32 key_tiles;   // the same for the keys
};
static_assert(sizeof(AttentionArgs) == 168, "the host passes the same structure");

constexpr float LOG2_E = 1.44269504088896341f;

/// A sequence of a packed batch.
struct Sequence {
    u32 q_begin, queries; // first row and number of its queries
    u32 k_begin, keys;
    /// Position of the first query.
    DEVICE u32 first_position() const { return keys - queries; }
};
DEVICE Sequence sequence_at(const AttentionArgs& a, u32 s) {
    const u32 q_begin = a.q_offsets[s], k_begin = a.k_offsets[s];
    return Sequence{q_begin, a.q_offsets[s + 1] - q_begin, k_begin, a.k_offsets[s + 1] - k_begin};
}

/// The largest s with offsets[s] / divisor + s · slope <= value, where offsets[0] = 0 and offsets ascend. The
/// lanes of a warp search together, 32 candidates per round.
DEVICE u32 find_sequence(const u32* offsets, u32 sequences, u32 value, u32 divisor, u32 slope) {
    const u32 lane = threadIdx.x % 32;
    u32 first = 0, count = sequences; // the answer is in first..first + count
    while (count > 1) {
        const u32 step = (count + 31) / 32;
        const u32 at = lane * step;
        const bool below = at < count && offsets[first + at] / divisor + (first + at) * slope <= value;
        const u32 last = __popc(__ballot_sync(FULL_WARP, below)) - 1; // lane 0 is always below
        first += last * step;
        count = step < count - last * step ? step : count - last * step;
    }
    return first;
}

/// Tiles of ROWS rows, each within one sequence; a block whose number has no rows ends at once. The tiles are numbered
/// in one of two ways, so that a list of tiles is not needed. With `per_sequence`, every sequence has as many numbers as
/// the longest one has tiles: few are unused if the lengths are similar. With 0, sequence s owns the numbers from
/// offsets[s] / ROWS + s up to those of s + 1, which are as many as its tiles, or one more: the whole batch has
/// rows / ROWS + sequences numbers.
struct BlockTile {
    u32 sequence;
    u32 first; // first row of the tile, within the sequence
    bool exists;
};
template <u32 ROWS> DEVICE BlockTile block_tile(const u32* offsets, u32 sequences, u32 number, u32 per_sequence) {
    const u32 s = per_sequence ? number / per_sequence : find_sequence(offsets, sequences, number, ROWS, 1);
    const u32 begin = offsets[s], rows = offsets[s + 1] - begin;
    const u32 tile = per_sequence ? number % per_sequence : number - (begin / ROWS + s);
    return BlockTile{s, tile * ROWS, tile * ROWS < rows};
}

// ---- Tiles ----------------------------------------------------------------------------------------

/// Rows of HD bf16 in shared memory, in chunks of 16 bytes. Chunk c of row r is stored at a permuted position in
/// its row, so that the same chunk of eight adjacent rows covers all 32 banks: ldmatrix has no bank conflicts.
/// `data` is a multiple of 256 bytes.
template <int HD> struct Tile {
    static constexpr int CHUNKS = HD / 8;
    static_assert(HD == 64 || HD == 96 || HD == 128, "the swizzle supports only these sizes");
    bf16* data;
    DEVICE bf16* chunk(int row, int c) const {
        // A row of 96 elements is 1.5 times the banks: the parity of the row selects one half already.
        const int swizzled = HD == 96 ? c ^ (row / 2 % 4) : c ^ (row % 8);
        return data + row * HD + swizzled * 8;
    }
    /// The address of chunk `n + c` from that of chunk c of the same row, where n is even and c is 0 or 1, or c is 0:
    /// one instruction, where chunk() takes several.
    static DEVICE SharedAddress advance(SharedAddress c, int n) {
        return HD == 96 ? (c ^ (n % 4 * 16)) + n / 4 * 64 : c ^ (n * 16);
    }
    /// Starts copying rows `first..first + ROWS` of a matrix by all THREADS threads; rows from `end` on become
    /// zeros. The caller commits and waits.
    template <int ROWS, int THREADS>
    DEVICE void fetch(const bf16* from, u32 first, u32 end, u32 stride) const {
        // A thread copies the same chunk of every STEP-th row. STEP is a multiple of 8, so that the swizzle is the
        // same too, and addresses differ by constants. For 96, this needs only 96 of 128 threads.
        constexpr int COPIERS = THREADS / (8 * CHUNKS) * (8 * CHUNKS), STEP = COPIERS / CHUNKS;
        static_assert(COPIERS && ROWS % STEP == 0, "whole steps");
        if (COPIERS < THREADS && threadIdx.x >= COPIERS) return;
        const u32 row = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
        const SharedAddress to = shared_address(chunk(row, c));
        // The column is added in bytes: a sum of elements would be kept in two registers for each chunk.
        from = (const bf16*)((const u8*)(from + (u64)(first + row) * stride) + c * 16);
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++, from += (u64)STEP * stride)
            cp_async16(to + i * STEP * HD * 2, from, first + row + i * STEP < end); // reads nothing from the end on
    }
};

/// The address from which a lane reads the left operand of a product: 16 rows of `tile` from `row` on.
template <int HD> DEVICE SharedAddress left_address(Tile<HD> tile, int row) {
    const int lane = threadIdx.x % 32;
    return shared_address(tile.chunk(row + lane % 16, lane / 16));
}
/// The address from which a lane reads the right operand of a product with the transposed tile.
template <int HD> DEVICE SharedAddress transposed_address(Tile<HD> tile) {
    const int lane = threadIdx.x % 32;
    return shared_address(tile.chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
/// Sets sums to zero.
template <int M, int N> DEVICE void clear(float (&s)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M * N * 4; i++) s[i / 4 / N][i / 4 % N][i % 4] = 0.0f;
}
/// The left operand of a product by columns 16·k: 16·M rows.
template <int HD, int M> DEVICE void load_left(u32 (&a)[M][4], SharedAddress left, int k) {
#pragma unroll
    for (int m = 0; m < M; m++) ldmatrix_x4(a[m], Tile<HD>::advance(left, 2 * k) + m * 16 * HD * 2);
}

/// Whether the query at a position attends to a key: `distance` is the position of the query minus that of the key,
/// modulo 2^32, and `reach` is attention_reach.
DEVICE bool attends(u32 distance, u32 reach) { return distance < reach; }
/// The number of keys up to and including its own that a query attends to. Positions are below 2^31.
DEVICE u32 attention_reach(u32 window) { return window ? window : 0x80000000u; }

/// Loads the first KEPT parts of the left operand of multiply_transposed.
template <int HD, int M, int KEPT> DEVICE void keep_left(u32 (&kept)[KEPT + 1][M][4], SharedAddress left) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) load_left<HD, M>(kept[k], left, k);
}
/// s += left · rightᵀ, by columns 16·k: `a` is the left operand, `right` has N rows.
template <int HD, int M, int N>
DEVICE void multiply_transposed(float (&s)[M][N / 8][4], const u32 (&a)[M][4], SharedAddress right, int k) {
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
        u32 b[4];
        ldmatrix_x4(b, Tile<HD>::advance(right, 2 * k) + n * 8 * HD * 2);
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_16816(s[m][n], a[m], b[0], b[1]);
            mma_16816(s[m][n + 1], a[m], b[2], b[3]);
        }
    }
}
/// s += left · rightᵀ for 16·M rows of the left tile and all N rows of the right one. The first KEPT of HD / 16 parts of
/// the left operand have been loaded by keep_left.
template <int HD, int M, int N, int KEPT>
DEVICE void multiply_transposed(float (&s)[M][N / 8][4], const u32 (&kept)[KEPT + 1][M][4], SharedAddress left,
                                SharedAddress right) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) multiply_transposed<HD, M, N>(s, kept[k], right, k);
#pragma unroll
    for (int k = KEPT; k < HD / 16; k++) {
        u32 loaded[M][4];
        load_left<HD, M>(loaded, left, k);
        multiply_transposed<HD, M, N>(s, loaded, right, k);
    }
}
/// The same if none has been loaded.
template <int HD, int M, int N>
DEVICE void multiply_transposed(float (&s)[M][N / 8][4], SharedAddress left, SharedAddress right) {
    const u32 none[1][M][4] = {};
    multiply_transposed<HD, M, N, 0>(s, none, left, right);
}

/// Rounds sums [16·M, N] to bf16 as the left operand of a product: a[k] is columns 16·k. The accumulators of a product
/// are laid out like the left operand of the next.
template <int M, int N> DEVICE void pack_left(u32 (&a)[N / 16][M][4], const float (&s)[M][N / 8][4]) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][m][i] = pack_bf16(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

/// o += left · right with N rows in `right`, whose address is a left_address; `a` is the left operand.
template <int HD, int M, int N>
DEVICE void multiply(float (&o)[M][HD / 8][4], const u32 (&a)[N / 16][M][4], SharedAddress right) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int n = 0; n < HD / 8; n += 2) {
            u32 b[4];
            ldmatrix_x4_trans(b, Tile<HD>::advance(right, n) + k * 16 * HD * 2);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816(o[m][n], a[k][m], b[0], b[1]);
                mma_16816(o[m][n + 1], a[k][m], b[2], b[3]);
            }
        }
}
/// o += s · right, s rounded to bf16.
template <int HD, int M, int N>
DEVICE void multiply(float (&o)[M][HD / 8][4], const float (&s)[M][N / 8][4], SharedAddress right) {
    u32 a[N / 16][M][4];
    pack_left<M, N>(a, s);
    multiply<HD, M, N>(o, a, right);
}

/// Writes 16·M rows of a warp, row m·16 + h·8 + lane / 4 times factor[m][h], to rows `first + row..` of a
/// matrix, those below `end`. They pass through rows `row..row + 16·M` of `stage`, which no other warp may
/// be using, so that whole chunks are stored.
template <int HD, int M>
DEVICE void store_rows(const float (&o)[M][HD / 8][4], const float (&factor)[M][2], Tile<HD> stage, int row,
                       bf16* to, u32 first, u32 end, u32 stride) {
    const int lane = threadIdx.x % 32;
    const SharedAddress base = shared_address(stage.data);
    const SharedAddress at = shared_address(stage.chunk(row + lane / 4, 0)) - base + lane % 4 * 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < HD / 8; n++)
                *(u32*)((u8*)stage.data + Tile<HD>::advance(at, n) + (m * 16 + h * 8) * HD * 2) =
                    pack_bf16(o[m][n][2 * h] * factor[m][h], o[m][n][2 * h + 1] * factor[m][h]);
    __syncwarp();
    for (int i = lane; i < 16 * M * Tile<HD>::CHUNKS; i += 32) {
        const int r = row + i / Tile<HD>::CHUNKS, c = i % Tile<HD>::CHUNKS;
        if (first + r < end) store16(to + (u64)(first + r) * stride + c * 8, load16(stage.chunk(r, c)));
    }
}
