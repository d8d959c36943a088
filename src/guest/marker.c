#include <string.h>

#include "guest/guest.h"

/* The status is at most three digits; one more byte is its line feed. */
#define MARKER_STATUS_DIGITS 3

int guest_marker_find(const char *data, size_t length, const char *nonce, size_t *ret_before,
                      size_t *ret_after, int *ret_status) {
    size_t nonce_length = strlen(nonce);
    size_t from = 0;

    for (;;) {
        const char *rs = length > from ? memchr(data + from, '\036', length - from) : NULL;
        if (!rs) {
            *ret_before = length;
            return 0;
        }
        size_t at = (size_t)(rs - data);
        size_t i = at + 1, matched = 0;
        while (i < length && matched < nonce_length && data[i] == nonce[matched])
            i++, matched++;
        if (i < length && matched == nonce_length && data[i] == ' ') {
            int status = 0, digits = 0;
            for (i++;
                 i < length && data[i] >= '0' && data[i] <= '9' && digits < MARKER_STATUS_DIGITS;
                 i++, digits++)
                status = status * 10 + (data[i] - '0');
            if (i < length && digits > 0 && data[i] == '\n') {
                *ret_before = at;
                *ret_after = i + 1;
                *ret_status = status;
                return 1;
            }
        }
        if (i == length) { /* everything up to the end fits so far: more may come */
            *ret_before = at;
            return 0;
        }
        from = at + 1;
    }
}
