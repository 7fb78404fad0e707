/* Preloaded under AddressSanitizer: libraries stay loaded to the end, so that LeakSanitizer can still say which of them
 * an allocation came from, and lsan.supp can name Open MPI's plug-ins. */
int dlclose(void *handle);
int dlclose(void *handle) {
    (void) handle;
    return 0;
}
