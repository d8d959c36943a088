#include "check.h"
#include "util/errors.h"
#include "util/log.h"

static void every_condition_of_the_table_reaches_the_user_as_its_errno(void) {
#define ROW(name, number, text)                                                                    \
    CHECK_SAID(error_to_user(-ERR_##name) == number, "ERR_" #name " is not " #number);             \
    CHECK_SAID(!strcmp(error_text(-ERR_##name), text), "ERR_" #name ": %s",                        \
               error_text(-ERR_##name));
    ERRORS(ROW)
#undef ROW
}

static void no_two_conditions_share_an_errno(void) {
    /* Two rows of one number do not compile here. */
    switch (0) {
#define ROW(name, number, text) case number:
        ERRORS(ROW)
#undef ROW
    default:
        CHECK(1);
    }
}

static void success_is_zero(void) {
    CHECK(error_to_user(0) == 0);
    CHECK(error_to_user(17) == 0);
    CHECK(!strcmp(error_text(0), "success"));
}

static void what_is_not_in_the_table_becomes_eio(void) {
    CHECK(error_to_user(-EDOM) == EIO);
    CHECK(error_to_user(-999999) == EIO);
    CHECK(!strcmp(error_text(-EDOM), strerror(EDOM)));
}

int main(void) {
    log_start(LOG_LEVEL_ERROR);
    every_condition_of_the_table_reaches_the_user_as_its_errno();
    no_two_conditions_share_an_errno();
    success_is_zero();
    what_is_not_in_the_table_becomes_eio();
    return check_end();
}
