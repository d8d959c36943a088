#include "util/random.h"

#include <errno.h>
#include <stdio.h>
#include <sys/random.h>

int random_nonce(char out[NONCE_LENGTH + 1]) {
    unsigned char bytes[NONCE_LENGTH / 2];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
        return -EIO;
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
    return 0;
}
