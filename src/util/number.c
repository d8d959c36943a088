#include "util/number.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int number_parse_size(const char *text, uint64_t unit, uint64_t *ret_bytes) {
    static const char letters[] = "KMGT";
    char *end;
    if (*text < '0' || *text > '9')
        return -EINVAL;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno)
        return -EINVAL;
    if (*end) {
        const char *letter = strchr(letters, *end & ~0x20);
        if (!letter || !*letter || end[1])
            return -EINVAL;
        unit = UINT64_C(1) << (10 * (letter - letters + 1));
    }
    if (unit && n > UINT64_MAX / unit)
        return -EINVAL;
    *ret_bytes = n * unit;
    return 0;
}

int number_parse_seconds(const char *text, double *ret_seconds) {
    size_t digits = strspn(text, "0123456789"), length = digits;
    if (text[length] == '.') {
        size_t fraction = strspn(text + length + 1, "0123456789");
        length += 1 + fraction;
        digits += fraction;
    }
    if (!digits || text[length] || length > 32)
        return -EINVAL;
    *ret_seconds = strtod(text, NULL); /* never called with a locale but C */
    return 0;
}

uint64_t number_hash(const char *data, size_t length) {
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ (unsigned char)data[i]) * 0x100000001b3;
    return hash;
}
