#include "vmm/usernet.h"

#include <string.h>

/* `  TCP[HOST_FORWARD]  13  127.0.0.1 40123  10.0.2.15  22  0  0` */
enum { FIELD_STATE, FIELD_FD, FIELD_ADDRESS, FIELD_PORT, FIELD_GUEST_ADDRESS, FIELD_GUEST_PORT };
#define FIELDS (FIELD_GUEST_PORT + 1)

struct field {
    const char *start;
    size_t length;
};

static int field_is(struct field f, const char *text) {
    return f.length == strlen(text) && memcmp(f.start, text, f.length) == 0;
}

/* 0 for anything that is not a decimal number from 1 to 65535. */
static uint16_t field_port(struct field f) {
    unsigned long value = 0;
    if (!f.length || f.length > 5)
        return 0;
    for (size_t i = 0; i < f.length; i++) {
        if (f.start[i] < '0' || f.start[i] > '9')
            return 0;
        value = value * 10 + (unsigned long)(f.start[i] - '0');
    }
    return value <= UINT16_MAX ? (uint16_t)value : 0;
}

static size_t fields_split(const char *line, size_t length, struct field *fields) {
    size_t count = 0, i = 0;
    while (count < FIELDS) {
        while (i < length && (line[i] == ' ' || line[i] == '\t'))
            i++;
        if (i == length)
            break;
        fields[count].start = line + i;
        while (i < length && line[i] != ' ' && line[i] != '\t')
            i++;
        fields[count].length = (size_t)(line + i - fields[count].start);
        count++;
    }
    return count;
}

uint16_t usernet_find_port(const char *text, size_t length, uint16_t guest_port) {
    while (length) {
        size_t line = 0;
        while (line < length && text[line] != '\n' && text[line] != '\r')
            line++;
        struct field f[FIELDS];
        if (fields_split(text, line, f) == FIELDS &&
            field_is(f[FIELD_STATE], "TCP[HOST_FORWARD]") &&
            field_is(f[FIELD_ADDRESS], "127.0.0.1") && field_port(f[FIELD_PORT]) &&
            field_port(f[FIELD_GUEST_PORT]) == guest_port)
            return field_port(f[FIELD_PORT]);
        size_t skip = line < length ? line + 1 : line;
        text += skip;
        length -= skip;
    }
    return 0;
}
