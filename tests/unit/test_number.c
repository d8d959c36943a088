#include "check.h"
#include "util/number.h"

static void sizes_are_read_with_and_without_letters(void) {
    static const struct {
        const char *text;
        uint64_t unit, bytes;
    } good[] = {{"0", 1, 0},
                {"512", 1, 512},
                {"512", 1048576, 536870912},
                {"64K", 1, 65536},
                {"1g", 1048576, 1 << 30},
                {"2T", 1, UINT64_C(2) << 40},
                {"16777215T", 1, UINT64_C(16777215) << 40}};
    static const char *const bad[] = {"",     "-1",  "+1",        " 1",
                                      "1 ",   "1KB", "K",         "1.5G",
                                      "0x10", "1E",  "16777216T", "99999999999999999999"};
    uint64_t bytes;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK_SAID(number_parse_size(good[i].text, good[i].unit, &bytes) == 0 &&
                       bytes == good[i].bytes,
                   "%s", good[i].text);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_SAID(number_parse_size(bad[i], 1, &bytes) < 0, "%s", bad[i]);
}

static void seconds_may_have_a_fraction(void) {
    static const char *const bad[] = {"", ".", "-1", "1e3", "1s", " 1", "nan", "1.2.3"};
    double seconds = 0;
    CHECK(number_parse_seconds("90", &seconds) == 0 && seconds > 89.99 && seconds < 90.01);
    CHECK(number_parse_seconds("0.5", &seconds) == 0 && seconds > 0.49 && seconds < 0.51);
    CHECK(number_parse_seconds(".25", &seconds) == 0 && seconds > 0.24 && seconds < 0.26);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_SAID(number_parse_seconds(bad[i], &seconds) < 0, "%s", bad[i]);
}

int main(void) {
    sizes_are_read_with_and_without_letters();
    seconds_may_have_a_fraction();
    return check_end();
}
