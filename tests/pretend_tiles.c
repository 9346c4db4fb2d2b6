/* AMX for processors that have none: the handler of the signal that an unknown instruction raises decodes those that tiles.c uses, does in C
   what Intel's manual says they do (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TILERELEASE), and goes on behind them. So what
   the tests run is what gcc made for AMX, and what a processor would refuse ends the process with a line. It is compiled into the library. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
    int rows, bytes;
    union {
        uint8_t byte[16][64];
        uint16_t half[16][32];
        float single[16][16];
    };
} tile;
static _Thread_local tile tiles[8];
static _Thread_local int configured;

static void refuse(const char *why) {
    const char *said[] = {"pretend_tiles: ", why, "\n"};
    for (int i = 0; i < 3; i++)
        if (write(2, said[i], strlen(said[i])) < 0) break;
    _exit(99);
}
static void require(int holds, const char *why) {
    if (!holds) refuse(why);
}

static float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void multiply(tile *c, const tile *a, const tile *b) {
    require(c != a && c != b && a != b, "a tile is named twice");
    require(c->rows == a->rows && c->bytes == b->bytes && a->bytes == 4 * b->rows, "the tiles' sizes do not fit");
    for (int m = 0; m < c->rows; m++)
        for (int k = 0; k < b->rows; k++)
            for (int pair = 0; pair < 2; pair++)
                for (int n = 0; n < c->bytes / 4; n++)
                    c->single[m][n] += widened(a->half[m][2 * k + pair]) * widened(b->half[k][2 * n + pair]);
}
static void configure(const uint8_t *from) {
    memset(tiles, 0, sizeof tiles);
    require(from[0] == 1 && from[1] == 0, "an unknown palette, or a start row");
    for (int i = 2; i < 64; i++) require((i >= 16 && i < 32) || (i >= 48 && i < 56) || !from[i], "reserved bytes are set");
    for (int i = 0; i < 8; i++) {
        uint16_t bytes;
        memcpy(&bytes, from + 16 + 2 * i, 2);
        require(bytes <= 64 && from[48 + i] <= 16, "a tile is too large");
        tiles[i].bytes = bytes, tiles[i].rows = from[48 + i];
    }
    configured = 1;
}

/* Instructions are C4, two bytes of prefix, opcode, ModRM, and where memory is meant SIB and displacement. */
static void unknown(int number, siginfo_t *info, void *context) {
    static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    greg_t *has = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)has[REG_RIP];
    (void)number, (void)info;
    require(code[0] == 0xC4 && (code[1] & 31) == 2 && !(code[2] & 0x84) && code[1] & 0x80, "not an instruction of tiles");
    int prefix = code[2] & 3, operation = code[3], mode = code[4] >> 6, to = code[4] >> 3 & 7, rm = code[4] & 7, length = 5;
    int second = ~code[2] >> 3 & 15, index_high = !(code[1] & 0x40) << 3, base_high = !(code[1] & 0x20) << 3;
    char *memory = NULL;
    long stride = 0, shift = 0;
    if (mode != 3) {
        int base = rm, index = -1, scale = 0;
        if (rm == 4) {
            base = code[5] & 7, index = (code[5] >> 3 & 7) | index_high, scale = code[5] >> 6, length = 6;
            if (index == 4) index = -1;
        }
        int no_base = mode == 0 && base == 5;
        if (mode == 1)
            shift = (int8_t)code[length++];
        else if (mode == 2 || no_base) {
            int32_t four;
            memcpy(&four, code + length, 4);
            shift = four, length += 4;
        }
        memory = (char *)((no_base ? (rm == 5 ? has[REG_RIP] + length : 0) : has[registers[base | base_high]]) + shift);
        stride = index < 0 ? 0 : has[registers[index]] << scale;
    }
    if (operation == 0x49 && prefix == 0 && mode != 3)
        configure((const uint8_t *)memory);
    else {
        require(configured, "the tiles are not configured");
        if (operation == 0x49 && prefix == 0)
            memset(tiles, 0, sizeof tiles), configured = 0;
        else if (operation == 0x49 && prefix == 3 && mode == 3)
            memset(tiles[to].byte, 0, sizeof tiles[to].byte);
        else if (operation == 0x4B && rm == 4 && (prefix == 1 || prefix == 3)) {
            memset(tiles[to].byte, 0, sizeof tiles[to].byte);
            for (int i = 0; i < tiles[to].rows; i++) memcpy(tiles[to].byte[i], memory + i * stride, tiles[to].bytes);
        } else if (operation == 0x4B && rm == 4 && prefix == 2)
            for (int i = 0; i < tiles[to].rows; i++) memcpy(memory + i * stride, tiles[to].byte[i], tiles[to].bytes);
        else if (operation == 0x5C && prefix == 2 && mode == 3 && second < 8)
            multiply(&tiles[to], &tiles[rm], &tiles[second]);
        else
            refuse("an instruction that this does not know");
    }
    has[REG_RIP] += length;
}

__attribute__((constructor)) static void listen(void) {
    struct sigaction action = {.sa_sigaction = unknown, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
}
