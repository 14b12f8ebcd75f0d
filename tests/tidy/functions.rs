//! Length and parameter count of every function, read off the syntax tree.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

const FUNCTION_LINES_MAX: usize = 70;
const PARAMETERS_MAX: usize = 5;

struct Functions<'a> {
    file: &'a str,
    offences: Vec<String>,
}

impl Functions<'_> {
    fn check(&mut self, signature: &syn::Signature, start: usize, end: usize) {
        let lines = end + 1 - start;
        if lines > FUNCTION_LINES_MAX {
            let name = &signature.ident;
            self.offences.push(format!(
                "{}:{start}: {name} has {lines} lines, at most {FUNCTION_LINES_MAX}",
                self.file
            ));
        }
        let typed = signature.inputs.iter().filter(|input| matches!(input, syn::FnArg::Typed(_)));
        let parameters = typed.count();
        if parameters > PARAMETERS_MAX && signature.abi.is_none() {
            let name = &signature.ident;
            self.offences.push(format!(
                "{}:{start}: {name} has {parameters} parameters, at most {PARAMETERS_MAX}",
                self.file
            ));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        let (start, end) = (item.sig.span().start().line, item.block.span().end().line);
        self.check(&item.sig, start, end);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        let (start, end) = (item.sig.span().start().line, item.block.span().end().line);
        self.check(&item.sig, start, end);
        visit::visit_impl_item_fn(self, item);
    }
}

/// Functions of one file that are too long or take too many parameters.
pub fn offences(file: &str, text: &str) -> Vec<String> {
    match syn::parse_file(text) {
        Ok(tree) => {
            let mut functions = Functions { file, offences: Vec::new() };
            functions.visit_file(&tree);
            functions.offences
        }
        Err(error) => vec![format!("{file}: does not parse: {error}")],
    }
}
