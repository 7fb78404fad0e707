/* bytes.c - what the library sends, to the byte: the same forms as sparse/lookup.c and sparse/backward.c write, which
 * tests/test_plan.c holds against the counters of real steps. */
#include "plan/plan.h"

static uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/* As sparse/payload.h lays a row out: whole words, int8 with a scale for every 64 columns. */
uint64_t cv_plan_row_bytes(int32_t type, int dim) {
    const uint64_t columns = (uint64_t) dim;
    switch (type) {
        case COVEY_BF16:
        case COVEY_F16: return round_up(2 * columns, 4);
        case COVEY_I8: return round_up(columns, 4) + 4 * ((columns + 63) / 64);
        default: return 4 * columns;
    }
}

uint64_t cv_plan_ids_message(int tables, uint64_t ids) {
    return CV_PLAN_FRAME + round_up(4 * (uint64_t) tables, 8) + 8 * ids;
}

uint64_t cv_plan_rows_message(uint64_t rows) { return CV_PLAN_FRAME + rows; }

enum { BLOCK_HEAD = 48 }; /* struct cv_gradient_head */

uint64_t cv_plan_gradient_block(int tables, bool only, uint64_t asked, uint64_t rows) {
    return round_up(BLOCK_HEAD + 4 * (uint64_t) tables + (only ? 0 : 4 * asked), 64) + round_up(rows, 64);
}

/* As world/view.c deals slices out, and as world/tree.c cuts a run into aligned blocks. */
int cv_plan_blocks(const struct cv_plan_world *world, int rank) {
    int first = 0, count = 0;
    for (int r = 0; r <= rank; r++) {
        first += count;
        count = world->slices / world->ranks + (r < world->slices % world->ranks);
    }
    if (!world->exact) return count > 0;
    int blocks = 0;
    for (; count > 0; blocks++) {
        int size = 1;
        while (first % (2 * size) == 0 && 2 * size <= count) size *= 2;
        first += size;
        count -= size;
    }
    return blocks;
}
