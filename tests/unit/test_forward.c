#include <string.h>

#include "check.h"
#include "util/buf.h"
#include "util/cleanup.h"
#include "vm/forward.h"

static int note(void *arg, const char *name, const char *value, size_t length) {
    struct buf *out = arg;
    buf_printf(out, "%s=%.*s;", name, (int)length, value);
    return 0;
}

static bool is_noted(void *arg, const char *name) {
    const struct buf *out = arg;
    cleanup_buf struct buf item = {0};
    buf_printf(&item, "%s=", name);
    return (out->len && strstr(out->data, item.data)) || strcmp(name, "GIVEN") == 0;
}

static bool is_uid(const char *name) {
    return strcmp(name, "UID") == 0;
}

static void names_are_looked_up_and_the_first_counts(void) {
    static const char environ[] = "A=1\0B=\0AB=ab\0C=x=y\0A=2\0broken\0=z\0D=last";
    static const struct {
        const char *text, *expected;
        int status;
    } rows[] = {
        {"A\nB\nC\nABSENT\n", "A=1;C=x=y;", 0},
        {"  # none\n\n\tAB \n", "AB=ab;", 0},
        {"D", "D=last;", 0},
        {"required A", "A=1;", 0},
        {"required B|AB|A\n", "AB=ab;A=1;", 0},
        {"A\nrequired B\nC\n", "A=1;C=x=y;", -22},
        {"required B|ABSENT", "", -22},
        {"required B|C\nrequired ABSENT|GIVEN", "C=x=y;", 0}, /* from elsewhere */
        {"required", "", 0},                                  /* a variable of this name */
        {"", "", 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        cleanup_buf struct buf out = {0};
        cleanup_free char *why = NULL;
        CHECK(forward_apply(rows[i].text, strlen(rows[i].text), environ, sizeof environ - 1, note,
                            &out) == 0);
        int r = forward_require(rows[i].text, strlen(rows[i].text), is_noted, &out, &why);
        CHECK_SAID(r == rows[i].status, "row %zu: %d", i, r);
        CHECK_SAID(!strcmp(out.data ? out.data : "", rows[i].expected), "row %zu: %s", i,
                   out.data ? out.data : "");
        CHECK_SAID((why != NULL) == (r < 0), "row %zu: words", i);
        CHECK_SAID(r == 0 || strstr(why, " has B"), "row %zu: %s", i, why ? why : "");
    }
}

static void bad_lines_are_named(void) {
    static const char *const bad[] = {"A\n1B\n",       "A\nA B",   "A\nA|\n",
                                      "A\n|A\n",       "A\nA=1",   "A\nrequired A B\n",
                                      "A\nrequired |", "A\nUID\n", "A\nrequired B|UID|C"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cleanup_free char *why = NULL;
        CHECK_SAID(forward_check(bad[i], strlen(bad[i]), is_uid, &why) < 0, "row %zu", i);
        CHECK_SAID(why && strstr(why, "line 2"), "row %zu: %s", i, why ? why : "");
    }
    cleanup_free char *why = NULL;
    CHECK(forward_check("A|B\nrequired\tA\n# x y\n", 21, is_uid, &why) == 0 && !why);
    CHECK(forward_is_empty("# A\n\n", 5) && !forward_is_empty("A", 1));
}

int main(void) {
    names_are_looked_up_and_the_first_counts();
    bad_lines_are_named();
    return check_end();
}
