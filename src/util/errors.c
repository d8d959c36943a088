#include "util/errors.h"

#include <stdarg.h>
#include <string.h>

#include "util/buf.h"
#include "util/log.h"

#define ERRORS_ROW(name, number, text) {number, text},
static const struct {
    int number;
    const char *text;
} error_table[] = {ERRORS(ERRORS_ROW)};
#undef ERRORS_ROW

int error_to_user(int status) {
    if (status >= 0)
        return 0;
    for (size_t i = 0; i < sizeof error_table / sizeof *error_table; i++)
        if (error_table[i].number == -status)
            return -status;
    log_error("unexpected error %d (%s) is answered as EIO", -status, strerror(-status));
    return ERR_IO;
}

const char *error_text(int status) {
    for (size_t i = 0; i < sizeof error_table / sizeof *error_table; i++)
        if (error_table[i].number == -status)
            return error_table[i].text;
    return status == 0 ? "success" : strerror(-status);
}

int error_of_host(int status) {
    if (status == -ENOSPC || status == -EDQUOT)
        return -ERR_NO_ROOM;
    return status < 0 ? -ERR_IO : 0;
}

int error_explain(int status, char **ret_why, const char *format, ...) {
    struct buf why = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&why, format, args);
    va_end(args);
    *ret_why = buf_steal(&why, NULL);
    return status;
}
