#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"

/* The functions of env_file.h for shell_roundtrip: standard input to standard output.
 *
 *   env_file_tool quote    any bytes -> one word
 *   env_file_tool format   (name NUL value NUL)… NUL kept -> the file
 *   env_file_tool parse    a file -> (name NUL value NUL)… NUL kept */

static struct buf input_read(void) {
    struct buf bytes = {0};
    char block[65536];
    for (size_t n; (n = fread(block, 1, sizeof block, stdin));)
        buf_append(&bytes, block, n);
    buf_append(&bytes, "", 0);
    return bytes;
}

static int gather(void *arg, const struct env_var *var) {
    buf_append(arg, var->name, var->name_length);
    buf_append_char(arg, '\0');
    buf_append(arg, var->value, var->length);
    buf_append_char(arg, '\0');
    return 0;
}

static int format(struct buf *out, const struct buf *in) {
    struct env_var vars[1000];
    size_t count = 0, at = 0;
    while (at < in->len && in->data[at]) {
        if (count == sizeof vars / sizeof *vars)
            return -1;
        struct env_var *var = &vars[count++];
        var->name = in->data + at;
        var->name_length = strlen(var->name);
        var->value = var->name + var->name_length + 1;
        var->length = strlen(var->value);
        at += var->name_length + var->length + 2;
    }
    at++;
    if (at > in->len)
        return -1;
    env_file_format(out, vars, count, in->data + at, in->len - at);
    return out->failed;
}

int main(int argc, char **argv) {
    cleanup_buf struct buf in = input_read(), out = {0}, kept = {0};
    const char *verb = argc == 2 ? argv[1] : "";
    int status = -1;
    if (!strcmp(verb, "quote")) {
        env_quote(&out, in.data, in.len);
        status = out.failed;
    } else if (!strcmp(verb, "format")) {
        status = format(&out, &in);
    } else if (!strcmp(verb, "parse")) {
        status = env_file_parse(in.data, in.len, gather, &out, &kept);
        buf_append_char(&out, '\0');
        buf_append(&out, kept.data, kept.len);
    }
    if (status < 0 || fwrite(out.data, 1, out.len, stdout) != out.len || fflush(stdout)) {
        fprintf(stderr, "env_file_tool: %s failed or is no verb (quote, format, parse)\n", verb);
        return 1;
    }
    return 0;
}
