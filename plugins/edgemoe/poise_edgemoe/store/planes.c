/* Codes of two planes put together: a byte of each makes two bytes, 4 codes of 2 + 2 bits or 2 of 4 + 4. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t spread(uint16_t x, int half)
{
    x = (x | x << 4) & 0x0f0f;
    return half == 4 ? x : (uint16_t)((x | x << 2) & 0x3333);
}

void poise_merge(const uint8_t *restrict high, const uint8_t *restrict low, uint8_t *restrict codes, size_t n,
                 int half)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t made = (uint16_t)(spread(high[i], half) << half | spread(low[i], half));
        codes[2 * i] = (uint8_t)made;
        codes[2 * i + 1] = (uint8_t)(made >> 8);
    }
}
