/* AMX's tiles in plain C, for processors that have none: what tiles.c uses of them, as Intel's manual has it (LDTILECFG, TILELOADD,
   TDPBF16PS, TILESTORED). gcc puts it in front of the source (-include). */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __AMX_BF16__ 1
#define TILES_STAND_IN 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig pretend_loadconfig
#define _tile_release pretend_release
#define _tile_loadd pretend_loadd
#define _tile_stored pretend_stored
#define _tile_zero pretend_zero
#define _tile_dpbf16ps pretend_dpbf16ps

typedef struct {
    int rows, bytes;
    union {
        uint8_t byte[16][64];
        uint16_t half[16][32];
        float single[16][16];
    };
} pretend_tile;
static _Thread_local pretend_tile pretend_tiles[8];

/* A tile that was not configured is an invalid instruction. */
static pretend_tile *pretend_configured(int number) {
    if (!pretend_tiles[number].rows) abort();
    return &pretend_tiles[number];
}
static void pretend_release(void) { memset(pretend_tiles, 0, sizeof pretend_tiles); }
static void pretend_loadconfig(const void *from) {
    const uint8_t *config = from;
    if (config[0] != 1) abort();
    pretend_release();
    for (int i = 0; i < 8; i++) {
        uint16_t bytes;
        memcpy(&bytes, config + 16 + 2 * i, 2);
        if (bytes > 64 || config[48 + i] > 16) abort();
        pretend_tiles[i].bytes = bytes, pretend_tiles[i].rows = config[48 + i];
    }
}
static void pretend_zero(int number) { memset(pretend_configured(number)->byte, 0, sizeof pretend_tiles->byte); }
static void pretend_loadd(int number, const void *from, long stride) {
    pretend_zero(number);
    pretend_tile *tile = pretend_configured(number);
    for (int i = 0; i < tile->rows; i++) memcpy(tile->byte[i], (const char *)from + i * stride, tile->bytes);
}
static void pretend_stored(int number, void *to, long stride) {
    pretend_tile *tile = pretend_configured(number);
    for (int i = 0; i < tile->rows; i++) memcpy((char *)to + i * stride, tile->byte[i], tile->bytes);
}
static float pretend_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void pretend_dpbf16ps(int to, int left, int right) {
    pretend_tile *c = pretend_configured(to), *a = pretend_configured(left), *b = pretend_configured(right);
    if (c->rows != a->rows || c->bytes != b->bytes || a->bytes != 4 * b->rows) abort();
    for (int m = 0; m < c->rows; m++)
        for (int k = 0; k < b->rows; k++)
            for (int n = 0; n < c->bytes / 4; n++)
                for (int pair = 0; pair < 2; pair++)
                    c->single[m][n] += pretend_float(a->half[m][2 * k + pair]) * pretend_float(b->half[k][2 * n + pair]);
}
