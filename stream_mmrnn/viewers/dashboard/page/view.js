// The newest state from the server, and the one on the page: another while the page is paused.
export const view = {newest: null, shown: null};
