/* tree.c - cutting a range of slices into whole subtrees. */
#include "world/world.h"

/* From the left, always the largest subtree that begins here and does not reach past the end: fewest blocks, because a
 * subtree that could be two of its halves is never cut. */
int cv_blocks_of(int first, int count, struct cv_block blocks[CV_BLOCKS_MAX]) {
    int found = 0;
    while (count > 0) {
        int size = first ? first & -first : CV_SLICES_MAX;
        while (size > count) size /= 2;
        blocks[found++] = (struct cv_block){.first = first, .size = size};
        first += size;
        count -= size;
    }
    return found;
}
